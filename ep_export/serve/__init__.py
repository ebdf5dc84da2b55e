"""A server with OpenAI's interface, and a page to try it. Needs the extra `[serve]`."""

from __future__ import annotations

from ep_export.serve.app import create_app
from ep_export.serve.limits import Limits
from ep_export.serve.server import bind, run_server, warm_up

__all__ = ["Limits", "bind", "create_app", "run_server", "warm_up"]
