"""`optimum-cli ep-export VERB ...`: the same verbs inside Hugging Face's command line.

Optimum parses with argparse, this package with click. Everything after `ep-export` is handed on as it is, so
there is one parser, one help and one set of exit codes.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ep_export.cli.main import main

__all__ = ["EpExportCommand"]

_NAME = "optimum-cli ep-export"


class EpExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """The subcommand; registered by `optimum_register.py`."""

    COMMAND = CommandInfo(
        name="ep-export", help="Export vision-language models with entropy pruning inside the decoder."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take everything as it is."""
        parser.prefix_chars = "\0"  # no argument begins with it, so none is an option of argparse's, nor -h
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Hand over to `ep-export`; exits with its code."""
        sys.argv = [_NAME, *self.args.arguments]
        main(_NAME)
