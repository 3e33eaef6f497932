"""Comparisons: norm × batch size × learning rate × seed, from the plan to the report."""
