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
    Source,
    TopK,
    reads_projections,
)

__all__ = ["ATTENTION_METHODS", "CHOOSER_METHODS", "FASTV", "chooser_method"]

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
    for method in (*CHOOSER_METHODS, *ATTENTION_METHODS):
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


_ATTENTION = TopK(Scorer.NORM, source=Source.ATTENTION)
_COVERED_ATTENTION = Coverage(Scorer.NORM, source=Source.ATTENTION)

FASTV = Method(
    key=_ATTENTION.name,
    title="FastV",
    source="arXiv 2403.06764",
    idea="keeps what the prompt's last token attends to most in layer K-1",
    chooser=_ATTENTION,
    published_layer=2,
)
"""Chen et al., ECCV 2024. The paper speaks of the attention received from all other tokens; the authors'
released code, on which their numbers rest, takes the attention of the prompt's last token alone, averaged
over heads, and so does `Source.ATTENTION`. Their default is K = 2."""

ATTENTION_METHODS = (
    FASTV,
    Method(
        key=_COVERED_ATTENTION.name,
        title="Coverage × FastV",
        source=_SCOPE,
        idea="keeps tokens that the last token attends to and far from what is kept already",
        chooser=_COVERED_ATTENTION,
    ),
)
"""Compared by a sweep, and not considered by a calibration."""

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
"""What a calibration considers by itself: the paper's first, the floor last."""
