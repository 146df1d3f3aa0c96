"""Weights in few bits: formats, codes and scales, and who gets which. NumPy only; knows no model and no graph."""
