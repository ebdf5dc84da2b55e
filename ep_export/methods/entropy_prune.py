"""EntropyPrune: the matrix entropy of a token's heads (arXiv 2602.17196), in all its spellings.

The scores are those of `ep_export.entropy`. The paper keeps the highest ones; the calibrator also tries the
lowest.
"""

from __future__ import annotations

import torch

from ep_export.entropy import select_tokens, token_scores
from ep_export.methods.contract import Choose, Method, TokenView
from ep_export.policy import Policy, Scorer, Select, Source

__all__ = ["ENTROPY_METHODS", "policy_method", "scored"]

_PAPER = "arXiv 2602.17196"
_SAID = {
    Scorer.PAPER: ("EntropyPrune", _PAPER, "matrix entropy of the centred, normalised heads"),
    Scorer.RELEASED: (
        "EntropyPrune, released code",
        f"{_PAPER}, its code",
        "matrix entropy of the centred heads, not normalised",
    ),
    Scorer.ORDER2: ("EntropyPrune, order 2", f"{_PAPER} with Rényi's entropy", "order-2 matrix entropy"),
}


def scored(scorer: Scorer, select: Select) -> Choose:
    """Keep one end of a score over the queries of layer K-1."""

    def choose(view: TokenView, k: int) -> torch.Tensor:
        queries = view.inside.queries
        scores = view.once(scorer, lambda: token_scores(queries[view.visual_index], scorer))
        return select_tokens(scores, k, select=select, visual_index=view.visual_index)

    return choose


def policy_method(policy: Policy, *, key: str, title: str, source: str) -> Method:
    """The method that a policy describes, wherever it prunes.

    Args:
        policy: Scores queries, the only states the calibrator compares.
        key: Of the method.
        title: Of the method.
        source: Of the method.

    Raises:
        ValueError: It scores other states.
    """
    if policy.source is not Source.QUERY:
        raise ValueError(f"policies are compared on queries, this one scores {policy.source.value} states")
    return Method(
        key=key,
        title=title,
        source=source,
        idea="keeps what a calibration on other pictures found best",
        choose=scored(policy.scorer, policy.select),
        ours=True,
    )


def _method(scorer: Scorer, select: Select) -> Method:
    title, source, score = _SAID[scorer]
    return Method(
        key=f"{scorer.value}-{select.value}",
        title=f"{title}, {select.value}",
        source=source if select is Select.HIGHEST else f"{source}, reversed",
        idea=f"keeps the tokens of {select.value} {score}",
        choose=scored(scorer, select),
        ours=True,
    )


ENTROPY_METHODS = tuple(_method(scorer, select) for scorer in _SAID for select in Select)
