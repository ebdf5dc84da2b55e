"""How an estimate is printed: time and memory, full against pruned, with the formula of every figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ep_export.cli.console import note, print_table
from ep_export.cli.units import bytes_text, ms_text, percent_text

if TYPE_CHECKING:
    from ep_export.fit import Estimate, Figures
    from ep_export.targets import Target
    from ep_export.what_fits import Suggestion

__all__ = ["fit_json", "plan_fit_json", "print_fit"]


def fit_json(guess: Estimate) -> dict[str, Any]:
    """An estimate for scripts."""
    from ep_export.documents import encode
    from ep_export.fit import FORMULAS

    fits = {"full": guess.fits(guess.full), "pruned": guess.fits(guess.pruned)}
    return {**encode(guess), "fits": fits, "formulas": FORMULAS}


def plan_fit_json(guess: Estimate | None, suggestions: Sequence[Suggestion] | None) -> dict[str, Any]:
    """What `plan --target` adds to a plan: the estimate, whether the pruned model, which will run, fits.

    All are null for a target without published figures. `suggestions` are there where it does not fit.
    """
    if guess is None:
        return {"target": None, "fits": None, "first_token_ms": None, "memory": None}
    sides = {"full": guess.full, "pruned": guess.pruned}
    told: dict[str, Any] = {
        "target": fit_json(guess),
        "fits": guess.fits(guess.pruned),
        "first_token_ms": {name: 1e3 * side.first_token_seconds for name, side in sides.items()},
        "memory": {name: _memory(guess, side) for name, side in sides.items()},
    }
    if suggestions is not None:
        from ep_export.documents import encode

        told["suggestions"] = [
            {**encode(each), "keep": each.keep.ratio, "keep_tokens": each.keep.tokens} for each in suggestions
        ]
    return told


def print_fit(
    target: Target, guess: Estimate | None, suggestions: Sequence[Suggestion] | None, *, weights: str
) -> None:
    """How fast it could be, does it fit, what would: on stdout, formulas and warnings on stderr."""
    from ep_export.fit import FORMULAS

    if guess is None:
        note(f"no estimate for {target.name}: memory and bandwidth depend on the machine")
        return
    title = f"estimate for {target.name}, {guess.graphs} graphs, weights in {weights}"
    print_table(title, ("", "full", "pruned", "saved"), [*_time_rows(guess), *_memory_rows(guess)])
    if suggestions is not None:
        _print_suggestions(target, suggestions)
    note("an estimate from published figures, nothing measured:")
    for name, formula in FORMULAS.items():
        note(f"  {name}: {formula}")


def _time_rows(guess: Estimate) -> list[tuple[str, str, str, str]]:
    full, pruned = guess.full, guess.pruned

    def row(name: str, before: float, after: float) -> tuple[str, str, str, str]:
        return name, ms_text(1e3 * before), ms_text(1e3 * after), _saved(before, after)

    return [
        row("time to first token, at best", full.first_token_seconds, pruned.first_token_seconds),
        row("  vision encoder", full.vision_seconds, pruned.vision_seconds),
        row("  prefill", full.prefill_seconds, pruned.prefill_seconds),
        row("a decoded token, at best", full.decode_seconds, pruned.decode_seconds),
    ]


def _memory_rows(guess: Estimate) -> list[tuple[str, str, str, str]]:
    names = {
        "total": "memory, together",
        "weights": "  weights",
        "caches": f"  KV caches of prompt and {guess.new_tokens} new tokens",
        "activations": "  activations",
        "embedding": "embedding table: on the host, not counted",
    }
    full, pruned = _memory(guess, guess.full), _memory(guess, guess.pruned)
    rows = [
        (title, bytes_text(full[name]), bytes_text(pruned[name]), _saved(full[name], pruned[name]))
        for name, title in names.items()
    ]
    before, after = (_share(side["total"], guess.available_bytes) for side in (full, pruned))
    rows.insert(1, (f"  of {bytes_text(guess.available_bytes)} there for it", before, after, ""))
    return rows


def _memory(guess: Estimate, side: Figures) -> dict[str, int]:
    """Bytes, part by part; the embedding table is read on the host and no part of the total."""
    return {
        "weights": guess.weight_bytes,
        "embedding": guess.embedding_bytes,
        "caches": side.kv_bytes,
        "activations": side.activation_bytes,
        "total": side.total_bytes,
    }


def _print_suggestions(target: Target, suggestions: Sequence[Suggestion]) -> None:
    if not suggestions:
        note(f"nothing of this family fits {target.name}: take another target or a smaller model")
        return
    print_table(
        f"what fits {target.name}",
        ("--model", "--weights", "keep", "memory", "first token", "a decoded token"),
        [
            (
                each.model,
                each.weights,
                str(each.keep),
                bytes_text(each.total_bytes),
                ms_text(each.first_token_ms),
                ms_text(each.decode_ms),
            )
            for each in suggestions
        ],
    )


def _saved(full: float, pruned: float) -> str:
    return percent_text(1 - pruned / full) if pruned < full else ""


def _share(total: int, available: int) -> str:
    return percent_text(total / available) + ("" if total <= available else ", does not fit")
