"""Measuring a bundle beside other ways to run its model, each a process of its own, in one run.

`compare.py` is the way in. Contenders live in `contenders/`; their libraries load there alone.
"""
