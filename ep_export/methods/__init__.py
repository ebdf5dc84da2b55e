"""Ways of keeping fewer visual tokens: the choosers a bundle can prune by, and rivals, one file each.

Merging is left out: SparseVLM (arXiv 2410.04417) is here without it, and VisionZip (arXiv 2412.04467), whose
contextual tokens are sums of others, is not here.
"""

from __future__ import annotations

from ep_export.errors import UsageError, near_matches
from ep_export.methods.cdpruner import CDPRUNER
from ep_export.methods.contract import Choose, LayerStates, Method, Place, StageCut, TokenView
from ep_export.methods.dart import DART
from ep_export.methods.fastv import FASTV
from ep_export.methods.ours import CHOOSER_METHODS, chooser_method
from ep_export.methods.scaled import SCALED, SCALED_FLOPS
from ep_export.methods.scope import SCOPE
from ep_export.methods.sparsevlm import SPARSEVLM, SPARSEVLM_STAGES
from ep_export.methods.stages import HORIZON, PYRAMID_DROP
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
    FASTV,
    DART,
    CDPRUNER,
    SCOPE,
    PYRAMID_DROP,
    SPARSEVLM_STAGES,
    HORIZON,
    SCALED,
    SCALED_FLOPS,
    CHOOSER_METHODS[-1],
)
"""In the order of the tables: ours, the rivals, the floor."""

_KNOWN = {method.key: method for method in (*METHODS, SPARSEVLM)}


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
    wanted = {key: method_named(key) for key in keys}
    listed = tuple(method for method in METHODS if method.key in wanted)
    return (*listed, *(method for key, method in wanted.items() if key not in _KNOWN))
