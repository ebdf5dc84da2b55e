"""What every way of pruning keeps of one prompt, cut after cut."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ep_export.adaptive import own_tokens
from ep_export.choosers import CutTokens, choose
from ep_export.measure.pruned import Arrival, KeptSets, arrivals
from ep_export.measure.view import arrived_states, instruction_positions, token_view, tower_attention
from ep_export.policy import Chooser, Cut, Random, Source, scored_source
from ep_export.reference.spans import cut_tokens

if TYPE_CHECKING:
    from ep_export.families.base import PromptInputs
    from ep_export.measure.bench import Bench
    from ep_export.measure.full_pass import FullPass
    from ep_export.measure.question import Question
    from ep_export.measure.ways import Way
    from ep_export.methods import Method, TokenView

__all__ = ["AtCut", "Prompted", "drawn_method", "kept_by"]

_SEEDS = 1 << 16  # of `ep_export.policy.Random`


@dataclass(frozen=True)
class Prompted:
    """A question as it stands before the model.

    Attributes:
        question: What is asked.
        prompt: Its prompt.
        full: The unpruned pass over it, with the layers of all ways.
        memo: What its vision tower showed, once a method has asked.
    """

    question: Question
    prompt: PromptInputs
    full: FullPass
    memo: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)


def kept_by(bench: Bench, prompted: Prompted, ways: Sequence[Way]) -> dict[str, list[KeptSets]]:
    """What every way keeps, once for every draw.

    All ways take their first cut, then those that have one their second, and so on: what several begin alike
    is run once, and what has one shape in one batch.

    Returns:
        Way key -> what is kept, a value a draw. Ways whose keep is impossible on this prompt are left out.
    """
    counts = _counts(bench, prompted, ways)
    kept: dict[tuple[Way, int], KeptSets] = {
        (way, draw): () for way in ways if way in counts for draw in range(bench.setting.draws_of(way))
    }
    for number in range(max((len(way.cuts) for way in counts), default=0)):
        # layer -> what was kept before -> who goes on from there
        waiting: dict[int, dict[KeptSets, list[tuple[Way, int]]]] = {}
        for (way, draw), sets in kept.items():
            if number < len(way.cuts):
                waiting.setdefault(way.cuts[number].layer, {}).setdefault(sets, []).append((way, draw))
        for layer, begun in waiting.items():
            for sets, arrival in arrivals(bench.decoder, prompted.full, begun, layer):
                here = AtCut(bench, prompted, arrival)
                for way, draw in begun[sets]:
                    method = drawn_method(bench, prompted.question, way, number, draw)
                    positions = here.choose(method, counts[way][number], way)
                    kept[way, draw] = (*sets, (layer, tuple(positions.tolist())))
    chosen: dict[str, list[KeptSets]] = {}
    for (way, _), sets in kept.items():
        chosen.setdefault(way.key, []).append(sets)
    return chosen


class AtCut:
    """What arrives at one cut, for every method that is to choose there; rivals share what they compute.

    Args:
        bench: The setting.
        prompted: What is asked.
        arrival: What arrives.
    """

    def __init__(self, bench: Bench, prompted: Prompted, arrival: Arrival) -> None:
        self._bench = bench
        self._prompted = prompted
        self._arrival = arrival

    @functools.cached_property
    def view(self) -> TokenView:
        """What a rival may look at."""
        words = self._bench.speller.words(self._prompted.question.text)
        return token_view(
            self._bench.decoder,
            self._bench.checkpoint.dims,
            self._prompted.full,
            self._arrival,
            instruction=instruction_positions(self._prompted.prompt, words),
            tower=self._tower_attention,
        )

    def _tower_attention(self) -> torch.Tensor:
        """Of the whole prompt; no cut changes it."""
        memo = self._prompted.memo
        if "tower" not in memo:
            family, prompt = self._bench.checkpoint.family, self._prompted.prompt
            memo["tower"] = tower_attention(family, self._bench.model, prompt)
        return memo["tower"]

    def tokens(self, chooser: Chooser) -> CutTokens:
        """What a chooser of ours looks at."""
        arrival, dims = self._arrival, self._bench.checkpoint.dims
        projections = dict(arrival.projections)
        if scored_source(chooser) is Source.ATTENTION:
            states = arrived_states(self._bench.decoder, dims, self._prompted.full, arrival)
            projections[Source.ATTENTION] = states.attention
        return cut_tokens(
            Cut(arrival.layer, chooser),
            dims,
            hidden=arrival.hidden,
            projections=projections,
            visual_index=arrival.visual_index,
        )

    def choose(self, method: Method, k: int, way: Way | None = None) -> torch.Tensor:
        """[k] int64 prompt positions that stay, ascending; fewer where the way's keep is the prompt's own."""
        if method.chooser is not None:
            tokens = self.tokens(method.chooser)
            choice = choose(method.chooser, tokens, k)
            if way is not None and way.keep.threshold is not None and choice.scores is not None:
                k = self._own_tokens(way, choice.scores)
                choice = choose(method.chooser, tokens, k)
            places = choice.kept
        elif method.choose is not None:
            places = method.choose(self.view, k)
        else:
            raise ValueError(f"method {method.key} has neither a chooser nor a choice of its own")
        visual = self._arrival.visual_index
        if len(places) != k or not torch.isin(places, visual).all() or (places.diff() <= 0).any():
            expected = f"expected {k} ascending visual positions"
            raise RuntimeError(f"{method.key} returned {places.tolist()}, {expected}")
        return self._arrival.positions[places]

    def _own_tokens(self, way: Way, scores: torch.Tensor) -> int:
        size = {"layers": self._bench.checkpoint.dims.layers, "visual_tokens": len(scores)}
        return own_tokens(way.keep, scores.cpu().numpy(), way.schedule, **size)


def _counts(bench: Bench, prompted: Prompted, ways: Sequence[Way]) -> dict[Way, tuple[int, ...]]:
    """For every way that is possible here, the tokens kept at each of its cuts."""
    size = {"layers": bench.checkpoint.dims.layers, "visual_tokens": len(prompted.full.visual_index)}
    return {way: way.kept(**size) for way in ways if way.fits(**size)}


def drawn_method(bench: Bench, question: Question, way: Way, number: int, draw: int) -> Method:
    """The method of a cut; one of chance with a seed of its own.

    It is made from the seed, the question, the way, the cut and the draw's number, so that a resumed run
    draws alike.
    """
    method = bench.methods[way.cuts[number].method]
    if not method.chance:
        return method
    text = f"{bench.setting.seed}/{draw}/{number}/{way.key}/{question.key}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") % _SEEDS
    return replace(method, chooser=Random(seed))
