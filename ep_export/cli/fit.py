"""How an estimate is printed: a table that says it is one, with the formula of every figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ep_export.cli.console import note, print_table

if TYPE_CHECKING:
    from ep_export.fit import Estimate
    from ep_export.targets import Target

__all__ = ["fit_json", "plan_fit_json", "print_fit"]


def fit_json(guess: Estimate) -> dict[str, Any]:
    """An estimate for scripts."""
    from ep_export.documents import encode
    from ep_export.fit import FORMULAS

    fits = {"full": guess.fits(guess.full), "pruned": guess.fits(guess.pruned)}
    return {**encode(guess), "fits": fits, "formulas": FORMULAS}


def plan_fit_json(guess: Estimate | None) -> dict[str, Any]:
    """What `plan --target` adds to a plan: the estimate, and whether the pruned model, which will run, fits.

    Both are null for a target without published figures.
    """
    if guess is None:
        return {"target": None, "fits": None}
    return {"target": fit_json(guess), "fits": guess.fits(guess.pruned)}


def print_fit(target: Target, guess: Estimate | None) -> None:
    """Does it fit, and how fast could it be: on stdout, formulas and warnings on stderr."""
    from ep_export.fit import FORMULAS

    if guess is None:
        note(f"no estimate for {target.name}: memory and bandwidth depend on the machine")
        return
    full, pruned = guess.full, guess.pruned
    rows = [
        ("weights", _gb(guess.weight_bytes), _gb(guess.weight_bytes)),
        ("KV cache", _gb(full.kv_bytes), _gb(pruned.kv_bytes)),
        ("activations", _gb(full.activation_bytes), _gb(pruned.activation_bytes)),
        ("together", _gb(full.total_bytes), _gb(pruned.total_bytes)),
        (
            f"of {_gb(guess.available_bytes)} for engines",
            _share(full.total_bytes, guess.available_bytes),
            _share(pruned.total_bytes, guess.available_bytes),
        ),
        ("prefill, at best", _ms(full.prefill_seconds), _ms(pruned.prefill_seconds)),
        ("a decoded token, at best", _ms(full.decode_seconds), _ms(pruned.decode_seconds)),
    ]
    title = f"estimate for {target.name}, {guess.graphs}"
    print_table(title, ("", "full", "pruned"), rows)
    note("an estimate from published figures, nothing measured:")
    for name, formula in FORMULAS.items():
        note(f"  {name}: {formula}")
    if not guess.vision_counted:
        note("  the vision encoder is not counted: its config has no fields that are known")


def _share(total: int, available: int) -> str:
    return f"{total / available:.0%}" + ("" if total <= available else ", does not fit")


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
