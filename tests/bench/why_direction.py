"""Why direction and layer matter on the shipped model: what the scores see, and what pruning takes away.

The scenes know where their digits are. At every layer K, each visual token is put into one of three classes
(on a digit; at the picture's edge; the rest of the background), and these questions are asked:

- Which class scores high? The share of (digit, background) pairs in which the digit's token scores higher:
  1 is always, 0.5 is blind, 0 is never.
- What do the heads do? How alike the centred heads of a token are (mean cosine without sign), and how long
  its queries are.
- What does a method take away? The share of digit tokens among the same number of kept tokens at every layer,
  and how many questions are still answered.
- What is needed? The same with all digit tokens kept first, and with all digit tokens dropped first.

Every figure is printed as measured. Needs nothing but this repository; a few minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from digit_scenes import Scene, held_out
from numpy.typing import NDArray

from ep_export.checkpoint import open_checkpoint
from ep_export.entropy import token_scores
from ep_export.families.base import Picture
from ep_export.measure.ask import full_pass
from ep_export.measure.bench import Bench, Setting, make_bench
from ep_export.measure.choosing import AtCut, Prompted
from ep_export.measure.pictures import PictureFile
from ep_export.measure.pruned import arrivals, pruned_log_probs
from ep_export.measure.question import Question
from ep_export.measure.spelling import says
from ep_export.measure.ways import one_cut
from ep_export.methods import METHODS
from ep_export.policy import Keep, Random, Scorer

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
DIGITS_FIRST, DIGITS_LAST = "digits first", "digits last"
ON_DIGIT = 0.1
"""A cell is on a digit when a digit's box covers so much of it: less is a corner, mostly without ink."""


@dataclass
class Layer:
    """What is collected at one layer; every list has a value a scene."""

    above: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    edge_above: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    alike: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    norm: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    digits_kept: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--share", type=float, default=0.125, help="share kept after every layer")
    parser.add_argument("--seed", type=int, default=3, help="of the held-out scenes")
    options = parser.parse_args()
    layers = {index: Layer() for index in options.layers}
    ways = tuple(one_cut(index, "random", Keep(ratio=1.0)) for index in layers)  # names the layers to keep
    bench = make_bench(open_checkpoint(str(READER)), Setting(ways, 1, options.seed, 8, "cpu"))
    used, cells = collect(bench, layers, options.questions, options.share, options.seed)
    print(
        f"{used} held-out questions that the unpruned model answers; {options.share:.1%} kept after layer K"
    )
    print(f"tokens: {cells['digit']:.1%} on a digit, {cells['edge']:.1%} at the edge, the rest background")
    show(layers)
    return 0


def collect(
    bench: Bench, layers: Mapping[int, Layer], questions: int, share: float, seed: int
) -> tuple[int, dict[str, float]]:
    """Run the scenes; returns how many were used and the mean shares of digit and edge tokens."""
    shares: dict[str, list[float]] = defaultdict(list)
    rng = np.random.default_rng(seed)
    for scene, question in held_out(questions, seed=seed):
        prompt = bench.builder.build([scene.picture], question.text)
        answer = bench.speller.spell(question.answer)
        full = full_pass(bench, prompt, answer)
        if not says(full.log_probs, answer, bench.speller.end):
            continue
        digit, edge = classes(scene, prompt.pictures[0])
        shares["digit"].append(float(digit.mean()))
        shares["edge"].append(float(edge.mean()))
        prompted = Prompted(Question(PictureFile("", Path()), "", question.text), prompt, full)
        k = max(1, int(share * len(full.visual_index)))
        for index, layer in layers.items():
            ((_, arrival),) = arrivals(bench.decoder, full, [()], index)
            at_cut = AtCut(bench, prompted, arrival)
            look(layer, at_cut, digit, edge)
            kept = {name: ((index, positions),) for name, positions in choices(at_cut, digit, k, rng)}
            said = dict(pruned_log_probs(bench.decoder, full, kept.values()))
            for name, sets in kept.items():
                flags = np.isin(prompt.visual_index, sets[0][1])
                layer.digits_kept[name].append(float(flags[digit].sum() / min(digit.sum(), flags.sum())))
                layer.right[name].append(says(said[sets], answer, bench.speller.end))
    return len(shares["digit"]), {name: float(np.mean(values)) for name, values in shares.items()}


def classes(scene: Scene, picture: Picture) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[N] whether a token's cell lies on a digit, and whether it lies at the edge and on none."""
    rows, columns = picture.token_grid
    width, height = scene.picture.size
    covered = np.zeros((rows, columns))
    for digit in scene.digits:
        left, top, right, bottom = digit.box
        across = overlap(left / width * columns, right / width * columns, columns)
        down = overlap(top / height * rows, bottom / height * rows, rows)
        covered += down[:, None] * across[None, :]
    on_digit = covered >= ON_DIGIT
    edge = np.ones((rows, columns), dtype=bool)
    edge[1:-1, 1:-1] = False
    return on_digit.ravel(), (edge & ~on_digit).ravel()


def overlap(low: float, high: float, cells: int) -> NDArray[np.float64]:
    """[cells] how much of each unit cell lies between two coordinates."""
    starts = np.arange(cells)
    return np.clip(np.minimum(high, starts + 1) - np.maximum(low, starts), 0, 1)


def look(layer: Layer, at_cut: AtCut, digit: NDArray[np.bool_], edge: NDArray[np.bool_]) -> None:
    """What the scores and the heads of each class look like."""
    states = at_cut.view.inside.queries[at_cut.view.visual_index]
    background = ~digit & ~edge
    for scorer in Scorer:
        scores = token_scores(states, scorer).numpy()
        layer.above[scorer.value].append(above(scores[digit], scores[~digit]))
        layer.edge_above[scorer.value].append(above(scores[edge], scores[background]))
    alike, norm = likeness(states), states.flatten(1).norm(dim=1).numpy()
    for name, mask in (("digit", digit), ("edge", edge), ("background", background)):
        if mask.any():
            layer.alike[name].append(float(alike[mask].mean()))
            layer.norm[name].append(float(norm[mask].mean()))


def above(high: NDArray[np.float64], low: NDArray[np.float64]) -> float:
    """Share of pairs in which the first scores higher; ties count half."""
    difference = high[:, None] - low[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean()) if difference.size else 0.5


def likeness(states: torch.Tensor) -> NDArray[np.float64]:
    """[N] mean |cosine| between different heads of a token, after centring over heads."""
    rows = torch.nn.functional.normalize(states.double() - states.double().mean(dim=1, keepdim=True), dim=2)
    cosine = (rows @ rows.transpose(1, 2)).abs()
    heads = cosine.shape[1]
    return np.asarray((cosine.sum(dim=(1, 2)) - heads) / (heads * (heads - 1)))


def choices(
    at_cut: AtCut, digit: NDArray[np.bool_], k: int, rng: np.random.Generator
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What every method keeps, and what one keeps who knows where the digits are."""
    for method in METHODS:
        drawn = replace(method, chooser=Random(int(rng.integers(1 << 16)))) if method.chance else method
        yield method.key, tuple(at_cut.choose(drawn, k).tolist())
    visual = at_cut.view.visual_index
    order = rng.permutation(len(visual))
    for name, first in ((DIGITS_FIRST, digit), (DIGITS_LAST, ~digit)):
        chosen = np.concatenate([order[first[order]], order[~first[order]]])[:k]
        yield name, tuple(visual[torch.from_numpy(np.sort(chosen))].tolist())


def show(layers: Mapping[int, Layer]) -> None:
    """Four tables, a column a layer."""
    head = "".join(f"{f'K={index}':>9s}" for index in layers)
    print(f"\ndigit scores above background{'':6s}{head}")
    for scorer in Scorer:
        print(f"  {scorer.value:33s}" + cells(layers, lambda layer, s=scorer.value: np.mean(layer.above[s])))
    print(f"\nedge scores above inner background{'':1s}{head}")
    for scorer in Scorer:
        print(
            f"  {scorer.value:33s}"
            + cells(layers, lambda layer, s=scorer.value: np.mean(layer.edge_above[s]))
        )
    print(f"\nheads alike (mean |cosine|){'':8s}{head}")
    for name in ("digit", "edge", "background"):
        print(f"  {name:33s}" + cells(layers, lambda layer, n=name: np.mean(layer.alike[n])))
    print(f"\nlength of the queries{'':14s}{head}")
    for name in ("digit", "edge", "background"):
        print(f"  {name:33s}" + cells(layers, lambda layer, n=name: np.mean(layer.norm[n])))
    names = list(next(iter(layers.values())).right)
    print(f"\ndigit tokens kept, of those there was room for\n{'':35s}{head}")
    for name in names:
        print(f"  {name:33s}" + cells(layers, lambda layer, n=name: np.mean(layer.digits_kept[n]), "8.1%"))
    print(f"\nstill right\n{'':35s}{head}")
    for name in names:
        print(f"  {name:33s}" + cells(layers, lambda layer, n=name: np.mean(layer.right[n]), "8.1%"))
    print(
        f"\nrank correlation of the two over {len(names)} ways of choosing\n{'':35s}"
        + cells(layers, correlation)
    )


def cells(layers: Mapping[int, Layer], value, form: str = "8.2f") -> str:
    return "".join(f" {float(value(layer)):{form}}" for layer in layers.values())


def correlation(layer: Layer) -> float:
    """Spearman's, between digit tokens kept and questions still right."""
    kept = [np.mean(layer.digits_kept[name]) for name in layer.right]
    right = [np.mean(layer.right[name]) for name in layer.right]
    return float(np.corrcoef(ranks(kept), ranks(right))[0, 1])


def ranks(values: list[float]) -> NDArray[np.float64]:
    """Ranks, ties sharing their mean."""
    array = np.asarray(values)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


if __name__ == "__main__":
    raise SystemExit(main())
