"""Ways of keeping fewer visual tokens: the choosers a bundle can prune by, and rivals, one file each.

Merging is left out: SparseVLM (arXiv 2410.04417) and VisionZip (arXiv 2412.04467) are here without it.
"""

from __future__ import annotations

from ep_export.errors import UsageError, near_matches
from ep_export.methods.cdpruner import CDPRUNER
from ep_export.methods.contract import Choose, LayerStates, Method, Place, StageCut, TokenView
from ep_export.methods.dart import DART
from ep_export.methods.ours import ATTENTION_METHODS, CHOOSER_METHODS, FASTV, chooser_method
from ep_export.methods.scaled import SCALED, SCALED_FLOPS
from ep_export.methods.scope import SCOPE
from ep_export.methods.sparsevlm import SPARSEVLM, SPARSEVLM_STAGES
from ep_export.methods.stages import HORIZON, PYRAMID_DROP
from ep_export.methods.visionzip import VISIONZIP
from ep_export.policy import chooser_named

__all__ = [
    "METHODS",
    "SCALED",
    "SCALED_FLOPS",
    "Choose",
    "LayerStates",
    "Method",
    "Place",
    "StageCut",
    "TokenView",
    "chooser_method",
    "find_methods",
    "method_named",
]

METHODS: tuple[Method, ...] = (
    *CHOOSER_METHODS[:-1],
    *ATTENTION_METHODS,
    DART,
    CDPRUNER,
    SCOPE,
    VISIONZIP,
    PYRAMID_DROP,
    SPARSEVLM_STAGES,
    HORIZON,
    SCALED,
    SCALED_FLOPS,
    CHOOSER_METHODS[-1],
)
"""In the order of the tables: ours, the rivals, the floor."""

_KNOWN = {**{method.key: method for method in (*METHODS, SPARSEVLM)}, "fastv": FASTV}


def method_named(key: str) -> Method:
    """A rival, or the method that a policy is.

    Raises:
        UsageError: The name is neither.
    """
    if key in _KNOWN:
        return _KNOWN[key]
    try:
        return chooser_method(chooser_named(key))
    except UsageError as error:
        raise UsageError(f"method {key!r} is unknown", hint=near_matches(key, _KNOWN)) from error


def find_methods(keys: tuple[str, ...]) -> tuple[Method, ...]:
    """The methods of those names, in the order of `METHODS`, others last.

    Raises:
        UsageError: A name is unknown.
    """
    wanted = dict.fromkeys(map(method_named, keys))
    listed = tuple(method for method in METHODS if method in wanted)
    return (*listed, *(method for method in wanted if method not in METHODS))
