# ruff: noqa: T201 - it talks to verify.sh on stdout
"""Judge which tokens a device kept, and write what the head's outputs must then be.

    check_choice.py CHOICE.json GOLDEN_OUTPUTS.json GOT_OUTPUTS.json WANTED_OUTPUTS.json

Two ways of rounding rank two tokens of nearly equal score differently, and both are right. A set that
differs from PyTorch's only in tokens whose exact scores lie within `tolerance` of the last one kept is such a
near-tie: then the rows that the device kept are compared with PyTorch's for those positions. Any other set
is a difference.

Exit codes: 0 equal or near-tie (the line says which), 3 different. PyTorch is hidden from Polygraphy unless
KIT_TORCH is 1, as in polygraphy_run.py.
"""

import contextlib
import os
import sys

import numpy as np

HIGHEST = "highest"
DIFFERENT = 3


def main(choice_file: str, golden_file: str, got_file: str, wanted_file: str) -> int:
    """Judge one case; its only run is the first of each file."""
    with contextlib.redirect_stdout(sys.stderr):  # where Polygraphy logs
        code, verdict = judge(choice_file, golden_file, got_file, wanted_file)
    print(verdict)
    return code


def judge(choice_file: str, golden_file: str, got_file: str, wanted_file: str) -> tuple:
    """Exit code and what to say."""
    from polygraphy.comparator import IterationResult, RunResults  # noqa: PLC0415 - after torch was hidden
    from polygraphy.json import load_json  # noqa: PLC0415

    choice = load_json(choice_file)
    golden, got = (RunResults.load(file)[0][1][0] for file in (golden_file, got_file))
    kept = np.asarray(got["kept_index"]).astype(np.int64)
    complaint = broken(choice, kept)
    if complaint:
        return DIFFERENT, complaint
    visual = kept[np.isin(kept, choice["visual_index"])]
    exchanged = np.setdiff1d(choice["kept"], visual)
    if len(exchanged) and not near_tie(choice, visual):
        return (
            DIFFERENT,
            f"{len(exchanged)} of {len(choice['kept'])} kept tokens differ, by more than near-ties",
        )
    wanted = {**golden}
    wanted["hidden_states"] = choice["hidden_states"][:, kept]
    wanted["kept_position_ids"] = choice["position_ids"][..., kept]
    wanted["kept_index"] = kept
    RunResults([("pytorch", [IterationResult(outputs=wanted, runner_name="pytorch")])]).save(wanted_file)
    tied = f", {len(exchanged)} of them by a near-tie" if len(exchanged) else ", all of them PyTorch's"
    return 0, f"{len(visual)} of {len(choice['visual_index'])} visual tokens kept{tied}"


def broken(choice: dict, kept: np.ndarray) -> str:
    """What is wrong with a set before scores are looked at; empty when nothing is."""
    length = choice["hidden_states"].shape[1]
    if kept.ndim != 1 or np.any(np.diff(kept) <= 0) or np.any((kept < 0) | (kept >= length)):
        return "kept positions are out of order, repeated or outside the prompt"
    text = np.setdiff1d(np.arange(length), choice["visual_index"])
    if not np.isin(text, kept).all():
        return f"{int((~np.isin(text, kept)).sum())} text tokens were dropped"
    count = len(kept) - len(text)
    if count != len(choice["kept"]):
        return f"{count} visual tokens were kept, expected {len(choice['kept'])}"
    return ""


def near_tie(choice: dict, kept: np.ndarray) -> bool:
    """Whether every exchanged token scores within the tolerance of the last one PyTorch keeps.

    With a budget for each picture that is the last one of its own, and every picture keeps its number.
    """
    index, scores = choice["visual_index"], choice["scores"]
    ours, theirs = np.isin(index, choice["kept"]), np.isin(index, kept)
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


if __name__ == "__main__":
    if os.environ.get("KIT_TORCH") != "1":
        sys.modules["torch"] = None
    raise SystemExit(main(*sys.argv[1:]))
