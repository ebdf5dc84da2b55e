"""Methods that a bundle can prune by: the choosers of `ep_export.policy`, described for people.

Nothing is computed here; their exact forms are in `ep_export.choosers`.
"""

from __future__ import annotations

from ep_export.methods.contract import Method, Place
from ep_export.policy import (
    Chooser,
    Coverage,
    MaxMin,
    Random,
    Scorer,
    Select,
    TopK,
    reads_projections,
)

__all__ = ["CHOOSER_METHODS", "chooser_method"]

_PAPER = "arXiv 2602.17196"
_SCORERS = {
    Scorer.PAPER: ("EntropyPrune", _PAPER, "matrix entropy of the centred, normalised heads"),
    Scorer.RELEASED: (
        "EntropyPrune, released code",
        f"{_PAPER}, its code",
        "matrix entropy of the centred heads, not normalised",
    ),
    Scorer.ORDER2: ("EntropyPrune, order 2", f"{_PAPER} with Rényi's entropy", "order-2 matrix entropy"),
    Scorer.NORM: ("Query norm", "plain rival, no paper", "L2 norm of the queries, no entropy at all"),
}


def chooser_method(chooser: Chooser) -> Method:
    """The method that a chooser is; one that is not listed goes by its policy name."""
    for method in CHOOSER_METHODS:
        if method.chooser == chooser:
            return method
    return Method(
        key=chooser.name,
        title=chooser.name,
        source="ep-export",
        idea=f"keeps by {chooser}",
        place=Place.INSIDE if reads_projections(chooser) else Place.ANYWHERE,
        chooser=chooser,
    )


def _scored(scorer: Scorer, select: Select) -> Method:
    title, source, score = _SCORERS[scorer]
    chooser = TopK(scorer, select)
    reversed_paper = select is Select.LOWEST and scorer is not Scorer.NORM
    return Method(
        key=chooser.name,
        title=f"{title}, {select.value}",
        source=f"{source}, reversed" if reversed_paper else source,
        idea=f"keeps the tokens of {select.value} {score}",
        chooser=chooser,
    )


_DIVPRUNE = Method(
    key=MaxMin().name,
    title="DivPrune",
    source="arXiv 2503.02175",
    idea="keeps tokens whose states are far from each other; before the decoder these are the embeddings",
    place=Place.ANYWHERE,
    chooser=MaxMin(),
    published_layer=0,
)

_SCOPE = "after SCOPE, arXiv 2510.24214"


def _coverage(chooser: Coverage) -> Method:
    title, _, score = _SCORERS[chooser.scorer]
    return Method(
        key=chooser.name,
        title=f"Coverage × {title}, {chooser.select.value}",
        source=_SCOPE,
        idea=f"keeps tokens of {chooser.select.value} {score} and far from what is kept already",
        chooser=chooser,
    )


_RANDOM = Method(
    key=Random().name,
    title="Random",
    source="the floor",
    idea="keeps tokens drawn without looking",
    place=Place.ANYWHERE,
    chooser=Random(),
)

CHOOSER_METHODS: tuple[Method, ...] = (
    *(_scored(scorer, select) for scorer in Scorer for select in Select),
    _DIVPRUNE,
    *(_coverage(Coverage(scorer, select)) for scorer in (Scorer.PAPER, Scorer.NORM) for select in Select),
    _RANDOM,
)
"""The paper's first, the floor last."""
