"""Quantised weights: their forms, the rounding, and the bytes that each runtime reads."""
