"""Runs the module of `mla_device` that this file is named for: build.py, verify.py."""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    named = os.path.splitext(os.path.basename(__file__))[0]
    runpy.run_module("mla_device." + named, run_name="__main__", alter_sys=True)
