"""The plain rival: the L2 norm of a token's queries at layer K-1, no entropy at all."""

from __future__ import annotations

from ep_export.methods.contract import Method
from ep_export.methods.entropy_prune import scored
from ep_export.policy import Scorer, Select

__all__ = ["NORM_METHODS"]

NORM_METHODS = tuple(
    Method(
        key=f"norm-{select.value}",
        title=f"Query norm, {select.value}",
        source="plain rival, no paper",
        idea=f"keeps the tokens whose queries have the {select.value} L2 norm",
        choose=scored(Scorer.NORM, select),
        ours=True,
    )
    for select in Select
)
