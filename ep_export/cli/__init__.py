"""The command line: parse, call one function, print. Nothing heavy is imported before a verb runs."""

from ep_export.cli.main import main

__all__ = ["main"]
