"""Export vision-language models with pruning inside the decoder.

The command line is `ep-export`; from Python its main verbs:

    import ep_export

    ep_export.plan("qwen2.5-vl-7b", keep=0.25)                    # what it saves, from the config alone
    ep_export.build("DIR", "bundle", keep=0.25, images="PICTURES")  # a bundle, compared with PyTorch
    with ep_export.open("bundle") as bundle:                      # no torch from here on
        print(bundle.answer("photo.jpg", "What is this?").answer)
    with ep_export.prune(model, keep=0.25, layer=1):              # a Hugging Face model, pruned
        model.generate(**inputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ep_export.api import build, plan, prune
    from ep_export.api import open_bundle as open  # noqa: A004 - `ep_export.open` is what one types
    from ep_export.errors import UserError
    from ep_export.serving import Engine, Request, Stream

__all__ = ["Engine", "Request", "Stream", "UserError", "__version__", "build", "open", "plan", "prune"]

__version__ = "0.2.0"

_PLACES = {
    "Engine": ("ep_export.serving", "Engine"),
    "Request": ("ep_export.serving", "Request"),
    "Stream": ("ep_export.serving", "Stream"),
    "UserError": ("ep_export.errors", "UserError"),
    "build": ("ep_export.api", "build"),
    "open": ("ep_export.api", "open_bundle"),
    "plan": ("ep_export.api", "plan"),
    "prune": ("ep_export.api", "prune"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: `ep-export --help` must not wait for NumPy."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
