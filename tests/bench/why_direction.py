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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from digit_scenes import Scene, held_out
from numpy.typing import NDArray

from ep_export.calibrate.fidelity import pruned_log_probs, run_full
from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.entropy import token_scores
from ep_export.families.base import Picture
from ep_export.methods import METHODS, TokenView
from ep_export.policy import Scorer
from ep_export.reference import load_model
from ep_export.sweep.spelling import Speller, says
from ep_export.sweep.view import instruction_positions, token_view

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
    checkpoint = open_checkpoint(str(READER))
    layers = {index: Layer() for index in options.layers}
    used, cells = collect(checkpoint, layers, options.questions, options.share, options.seed)
    print(
        f"{used} held-out questions that the unpruned model answers; {options.share:.1%} kept after layer K"
    )
    print(f"tokens: {cells['digit']:.1%} on a digit, {cells['edge']:.1%} at the edge, the rest background")
    show(layers)
    return 0


def collect(
    checkpoint: Checkpoint, layers: Mapping[int, Layer], questions: int, share: float, seed: int
) -> tuple[int, dict[str, float]]:
    """Run the scenes; returns how many were used and the mean shares of digit and edge tokens."""
    model = load_model(checkpoint)
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    speller = Speller(checkpoint.path, builder.eos_token_ids)
    decoder = checkpoint.family.decoder(model)
    shares: dict[str, list[float]] = defaultdict(list)
    rng = np.random.default_rng(seed)
    for scene, question in held_out(questions, seed=seed):
        prompt = builder.build([scene.picture], question.text)
        answer = speller.spell(question.answer)
        full = run_full(
            model,
            checkpoint.family,
            prompt,
            answer,
            layers=[0, *layers],
            heads=checkpoint.dims.heads,
            entropies=False,
            projections=True,
        )
        if not says(full.log_probs, answer, speller.end):
            continue
        digit, edge = classes(scene, prompt.pictures[0])
        shares["digit"].append(float(digit.mean()))
        shares["edge"].append(float(edge.mean()))
        instruction = instruction_positions(prompt, speller.words(question.text))
        for index, layer in layers.items():
            view = token_view(
                decoder, checkpoint.dims, full, index, prompt=prompt, instruction=instruction, rng=rng
            )
            look(layer, view, digit, edge)
            kept = dict(choices(view, digit, max(1, int(share * view.count)), rng))
            for (name, chosen), log_probs in zip(
                kept.items(), pruned_log_probs(decoder, full, index, list(kept.values())), strict=True
            ):
                flags = torch.isin(view.visual_index, chosen).numpy()
                layer.digits_kept[name].append(float(flags[digit].sum() / min(digit.sum(), flags.sum())))
                layer.right[name].append(says(log_probs, answer, speller.end))
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


def look(layer: Layer, view: TokenView, digit: NDArray[np.bool_], edge: NDArray[np.bool_]) -> None:
    """What the scores and the heads of each class look like."""
    states = view.inside.queries[view.visual_index]
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
    view: TokenView, digit: NDArray[np.bool_], k: int, rng: np.random.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """What every method keeps, and what one keeps who knows where the digits are."""
    for method in METHODS:
        yield method.key, method.choose(view, k)
    order = rng.permutation(view.count)
    for name, first in ((DIGITS_FIRST, digit), (DIGITS_LAST, ~digit)):
        chosen = np.concatenate([order[first[order]], order[~first[order]]])[:k]
        yield name, view.visual_index[torch.from_numpy(np.sort(chosen))]


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
