"""The norms' operators with a gradient of their own; no policy, no state."""
