# ruff: noqa: T201 - it talks to verify.sh on stdout
"""Judge which tokens a device kept, and write what a prune component's outputs must then be.

    check_choice.py CHOICE.json INPUTS.json GOLDEN_OUTPUTS.json GOT_OUTPUTS.json WANTED_OUTPUTS.json

Two ways of rounding rank two tokens of nearly equal score differently, and both are right. A set that
differs from PyTorch's only by choices between tokens within `tolerance` of each other is such a near-tie:
then the rows that the device kept are compared with the inputs' own. Any other set is a difference. What a
near-tie is depends on the policy:

    top_k     every exchanged token scores within the tolerance of the last one PyTorch keeps
    max_min   the set has an order in which every token is, at its turn, within the tolerance of the farthest
    coverage  the same of a token's importance times its distance
    random, nothing   there are no near-ties

Exit codes: 0 equal or near-tie (the line says which), 3 different. PyTorch is hidden from Polygraphy unless
KIT_TORCH is 1, as in polygraphy_run.py.
"""

import collections
import contextlib
import os
import sys

import numpy as np

HIGHEST, TOP_K, MAX_MIN, COVERAGE = "highest", "top_k", "max_min", "coverage"
DIFFERENT = 3


def main(*files: str) -> int:
    """Judge one case; its only run is the first of each file."""
    with contextlib.redirect_stdout(sys.stderr):  # where Polygraphy logs
        code, verdict = judge(*files)
    print(verdict)
    return code


def judge(choice_file: str, inputs_file: str, golden_file: str, got_file: str, wanted_file: str) -> tuple:
    """Exit code and what to say."""
    from polygraphy.comparator import IterationResult, RunResults  # noqa: PLC0415 - after torch was hidden
    from polygraphy.json import load_json  # noqa: PLC0415

    choice, inputs = load_json(choice_file), load_json(inputs_file)[0]
    golden, got = (RunResults.load(file)[0][1][0] for file in (golden_file, got_file))
    rows, visual_index = np.asarray(got["kept_index"]).astype(np.int64), inputs["visual_index"]
    complaint = broken(choice, inputs, rows)
    if complaint:
        return DIFFERENT, complaint
    kept = rows[np.isin(rows, visual_index)]
    exchanged = np.setdiff1d(choice["kept"], kept)
    if len(exchanged) and not near_tie(choice, inputs, kept):
        return (
            DIFFERENT,
            f"{len(exchanged)} of {len(choice['kept'])} kept tokens differ, by more than near-ties",
        )
    wanted = {**golden}
    wanted["kept_hidden"] = inputs["hidden"][:, rows]
    wanted["kept_position_ids"] = inputs["position_ids"][..., rows]
    wanted["kept_index"] = rows
    wanted["kept_visual_index"] = np.flatnonzero(np.isin(rows, visual_index))
    if len(exchanged) and choice["kind"] in (MAX_MIN, COVERAGE):
        wanted["scores"] = got["scores"]  # distances to what was chosen before, which was another token
    RunResults([("pytorch", [IterationResult(outputs=wanted, runner_name="pytorch")])]).save(wanted_file)
    tied = f", {len(exchanged)} of them by a near-tie" if len(exchanged) else ", all of them PyTorch's"
    return 0, f"{len(kept)} of {len(visual_index)} visual tokens kept{tied if len(kept) else ''}"


def broken(choice: dict, inputs: dict, rows: np.ndarray) -> str:
    """What is wrong with a set before scores are looked at; empty when nothing is."""
    length = inputs["hidden"].shape[1]
    if rows.ndim != 1 or np.any(np.diff(rows) <= 0) or np.any((rows < 0) | (rows >= length)):
        return "kept positions are out of order, repeated or outside the prompt"
    text = np.setdiff1d(np.arange(length), inputs["visual_index"])
    if not np.isin(text, rows).all():
        return f"{int((~np.isin(text, rows)).sum())} text tokens were dropped"
    count = len(rows) - len(text)
    if count != len(choice["kept"]):
        return f"{count} visual tokens were kept, expected {len(choice['kept'])}"
    return ""


def near_tie(choice: dict, inputs: dict, kept: np.ndarray) -> bool:
    """Whether a set of as many tokens differs from PyTorch's by near-ties alone."""
    inside = np.isin(inputs["visual_index"], kept)
    if choice["kind"] == TOP_K:
        return scores_tie(choice, np.isin(inputs["visual_index"], choice["kept"]), inside)
    if choice["kind"] in (MAX_MIN, COVERAGE):
        hidden = np.asarray(inputs["hidden"], dtype=np.float64)[0, inputs["visual_index"]]
        return distances_tie(hidden, inside, choice["tolerance"], choice.get("weights"))
    return False


def scores_tie(choice: dict, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether every exchanged token scores within the tolerance of the last one PyTorch keeps.

    With a budget for each picture that is the last one of its own, and every picture keeps its number.
    """
    scores = choice["scores"]
    for picture in np.unique(choice["pictures"]):
        inside = choice["pictures"] == picture
        if ours[inside].sum() != theirs[inside].sum():
            return False
        own = scores[inside & ours]
        if not len(own):
            continue
        edge = own.min() if choice["select"] == HIGHEST else own.max()
        if np.any(np.abs(scores[inside & (ours != theirs)] - edge) >= choice["tolerance"]):
            return False
    return True


def distances_tie(
    hidden: np.ndarray, inside: np.ndarray, tolerance: float, weights: np.ndarray = None
) -> bool:
    """Whether choosing the farthest token in turn, erring by less than the tolerance, ends in this set.

    With `weights` (0 where a token is not finite) distances are multiplied by them, and the first token is
    the one of largest weight. Orders are tried depth first, the farthest token of the set first, for 4 k +
    256 steps, and no more than the last 64 turns are undone.
    """
    finite = np.isfinite(hidden).all(axis=1)
    if weights is not None:
        finite &= weights > 0
    rows = np.where(finite[:, None], hidden, 0.0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1.0)
    turns: collections.deque = collections.deque(maxlen=64)

    def add(nearest: np.ndarray, candidates: np.ndarray, distance: np.ndarray) -> None:
        tied = np.flatnonzero(candidates & (distance >= distance.max() - tolerance))
        if len(tied):
            turns.append((nearest, tied[np.argsort(distance[tied], kind="stable")].tolist()))

    first = nearest_neighbours(rows, finite) if weights is None else np.where(finite, weights, -1.0)
    add(np.where(finite, 4.0, -1.0), inside, first)
    for _ in range(4 * int(inside.sum()) + 256):
        if not turns:
            return False
        nearest, tied = turns[-1]
        chosen = tied.pop()
        if not tied:
            turns.pop()
        distance = np.round(1.0 - rows @ rows[chosen], 12)
        nearest = np.minimum(nearest, distance if weights is None else weights * distance)
        nearest[chosen] = -2.0  # never again
        candidates = inside & (nearest != -2.0)
        if not candidates.any():
            return True
        add(nearest, candidates, nearest)
    return False


def nearest_neighbours(rows: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Cosine distance of every token to its nearest neighbour, row by row: no N x N matrix."""
    nearest = np.full(len(rows), -1.0)
    for number in np.flatnonzero(finite):
        distance = np.round(1.0 - rows @ rows[number], 12)
        distance[~finite] = np.inf
        distance[number] = np.inf
        nearest[number] = distance.min()
    return nearest


if __name__ == "__main__":
    if os.environ.get("KIT_TORCH") != "1":
        sys.modules["torch"] = None
    raise SystemExit(main(*sys.argv[1:]))
