"""Rounding that is fitted to a text: whose inputs, which weights, and whether it was worth it."""
