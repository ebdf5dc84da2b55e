"""Quantities as people read them: one system of units, stepped up by thousands, three digits."""

from __future__ import annotations

__all__ = ["bytes_text", "flops_text", "keep_text", "ms_text", "percent_text"]

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def bytes_text(count: float) -> str:
    """`586 kB`, `16.6 GB`."""
    return _stepped(count, "B")


def flops_text(count: float) -> str:
    """`3.1 GFLOPs`, `8.80 TFLOPs`: multiplies and adds."""
    return _stepped(count, "FLOPs")


def ms_text(milliseconds: float) -> str:
    """`0.84 ms`, `291 ms`, `1.09 s`."""
    return f"{_digits(milliseconds)} ms" if milliseconds < 999.5 else f"{_digits(milliseconds / 1e3)} s"


def percent_text(share: float) -> str:
    """`22 %`; one more digit below 10."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 or percent == round(percent) else f"{percent:.1f} %"


def keep_text(shares: list[tuple[int, float]], average: float) -> str:
    """`10 % after layer 2 = 25 % on average`, from (layer, share) of every cut."""
    clauses = ", ".join(f"{percent_text(share)} after layer {layer}" for layer, share in shares)
    return f"{clauses} = {percent_text(average)} on average"


def _stepped(count: float, unit: str) -> str:
    for size, prefix in _STEPS:
        if count >= 0.9995 * size:
            return f"{_digits(count / size)} {prefix}{unit}"
    return f"{count:.0f} {unit}"


def _digits(value: float) -> str:
    """Three digits, as `0.84`, `2.30`, `16.6`, `586`."""
    return f"{value:.{max(0, 2 - (value >= 9.995) - (value >= 99.95))}f}"
