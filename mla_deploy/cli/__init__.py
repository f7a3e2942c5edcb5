"""The command line: one file per verb, each parses, calls one library function and prints."""

from mla_deploy.cli.entry import main

__all__ = ["main"]
