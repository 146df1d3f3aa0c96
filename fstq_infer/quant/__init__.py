"""Weights in few bits: formats, codes and scales, and who gets which format. NumPy only; knows no model and no graph."""
