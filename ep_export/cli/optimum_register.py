"""Installed as `optimum/commands/register/ep_export.py`, where `optimum-cli` looks for commands.

The rest of that namespace belongs to optimum; `pyproject.toml` puts this one file there.
"""

from __future__ import annotations

from ep_export.cli.optimum import EpExportCommand

__all__ = ["REGISTER_COMMANDS"]

REGISTER_COMMANDS = [EpExportCommand]
