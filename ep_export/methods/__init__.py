"""Ways of choosing visual tokens, one file a method, all behind one contract.

Left out, because they are not one choice of tokens at one layer: PyramidDrop (arXiv 2410.17247) drops in
several stages; SparseVLM (arXiv 2410.04417) prunes at several layers, each by its own share, and merges what
it drops into new tokens.
"""

from __future__ import annotations

from ep_export.errors import UsageError, near_matches
from ep_export.methods.cdpruner import CDPRUNER
from ep_export.methods.contract import Choose, LayerStates, Method, Place, TokenView
from ep_export.methods.dart import DART
from ep_export.methods.divprune import DIVPRUNE
from ep_export.methods.entropy_prune import ENTROPY_METHODS, policy_method
from ep_export.methods.fastv import FASTV
from ep_export.methods.query_norm import NORM_METHODS
from ep_export.methods.random_tokens import RANDOM_TOKENS

__all__ = [
    "METHODS",
    "RANDOM_TOKENS",
    "Choose",
    "LayerStates",
    "Method",
    "Place",
    "TokenView",
    "find_methods",
    "policy_method",
]

METHODS: tuple[Method, ...] = (
    *ENTROPY_METHODS,
    *NORM_METHODS,
    FASTV,
    DART,
    DIVPRUNE,
    CDPRUNER,
    RANDOM_TOKENS,
)
"""In the order of the tables: ours, the rivals, the floor."""


def find_methods(keys: tuple[str, ...]) -> tuple[Method, ...]:
    """The methods of those keys, in the order of `METHODS`.

    Raises:
        UsageError: A key is unknown.
    """
    known = {method.key: method for method in METHODS}
    for key in keys:
        if key not in known:
            raise UsageError(f"method {key!r} is unknown", hint=near_matches(key, known))
    return tuple(method for method in METHODS if method.key in keys)
