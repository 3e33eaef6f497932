"""Normalization layers for PyTorch that hold at any batch size, and the lab that proves it."""
