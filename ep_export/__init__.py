"""Export vision-language models with entropy pruning inside the decoder.

The command line is `ep-export`; from Python, `prune` runs a Hugging Face model pruned:

    from ep_export import make_plan, prune
    with prune(model, plan):
        model.generate(**inputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ep_export.plan import make_plan
    from ep_export.reference import prune

__all__ = ["__version__", "make_plan", "prune"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use: `ep-export --help` must not wait for torch."""
    if name == "prune":
        from ep_export.reference import prune

        return prune
    if name == "make_plan":
        from ep_export.plan import make_plan

        return make_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
