"""How large a difference may be, and why: every tolerance of a validation comes from here.

float32 graphs add the same numbers in another order than PyTorch does, so their tolerance is a rounding
estimate. Half-precision graphs round every intermediate; how much that moves this model's outputs is
measured, by running Hugging Face itself in that type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Component, Manifest, Precision, Role, TensorSpec
from ep_export.choosers import CutTokens
from ep_export.choosers.coverage import importance
from ep_export.choosers.greedy import FIRST_SCORE
from ep_export.dims import DecoderDims
from ep_export.entropy import EntropySeries, entropy_series, series_scores, token_scores
from ep_export.policy import Chooser, Coverage, MaxMin, Scorer, TopK

__all__ = [
    "EXACT",
    "INTEGERS",
    "Tolerance",
    "float32_tolerance",
    "half_tolerance",
    "layers_before",
    "output_tolerance",
    "score_bound",
    "score_tolerance",
    "tolerance_of",
]

_CACHES = "present."

_UNIT_FLOAT32 = 2.0**-24
_UNIT = {Precision.FP32: _UNIT_FLOAT32, Precision.FP16: 2.0**-11, Precision.BF16: 2.0**-8}
_ROUNDINGS_PER_LAYER = 8  # two norms, four matrix products in a row, softmax, gate
_WORST_OVER_TYPICAL = 16.0
"""The estimate is a standard deviation: 6 for the largest of a million elements, the rest for softmax and
norms, which amplify. Random models of every tested shape use at most a fifth of the tolerance."""
_HALF_MARGIN = 4.0
"""Two computations in the same half type differ from the truth by unrelated errors of the same size."""


@dataclass(frozen=True)
class Tolerance:
    """`relative` times the reference's largest magnitude, or `absolute`, whichever is larger.

    Attributes:
        relative: Factor of the reference's scale.
        absolute: Floor in the reference's unit.
        reason: For the report.
    """

    relative: float
    absolute: float
    reason: str

    def allowed(self, scale: float) -> float:
        """Largest difference allowed against a reference of this largest magnitude."""
        return max(self.relative * scale, self.absolute)


EXACT = Tolerance(0.0, 0.0, "both sides copy the same numbers")
INTEGERS = Tolerance(0.0, 0.0, "integers: equal or not")


def float32_tolerance(dims: DecoderDims, layers: int) -> Tolerance:
    """What the order of float32 additions may change after `layers` layers, as a random walk.

    A dot product over n terms rounds by about sqrt(n) units; `layers` layers chain 8 such steps each.

    Args:
        dims: The decoder's; n is the widest dot product.
        layers: Layers the value went through, at least 1.
    """
    width = max(dims.hidden_size, dims.ffn_size)
    steps = _ROUNDINGS_PER_LAYER * max(layers, 1)
    relative = _WORST_OVER_TYPICAL * _UNIT_FLOAT32 * math.sqrt(width * steps)
    reason = (
        f"float32 sums in another order: {_WORST_OVER_TYPICAL:g} x 2^-24 x sqrt({width} terms x {steps} "
        f"roundings) = {relative:.1e} of the reference's largest value"
    )
    return Tolerance(relative, 0.0, reason)


def half_tolerance(float32: Tolerance, noise: float, precision: Precision) -> Tolerance:
    """What a half-precision graph may differ from the float32 oracle.

    Args:
        float32: Added; it also covers outputs that Hugging Face happens to compute exactly.
        noise: Largest difference between Hugging Face run in `precision` and in float32 on the same inputs.
        precision: fp16 or bf16.
    """
    reason = (
        f"{precision.value} graph against the float32 oracle: {_HALF_MARGIN:g} x the error of Hugging "
        f"Face's own {precision.value} run on the same input, plus one {precision.value} rounding"
    )
    return Tolerance(float32.relative + _UNIT[precision], _HALF_MARGIN * noise, reason)


def tolerance_of(manifest: Manifest, layers: int, noise: float) -> Tolerance:
    """For a value of a bundle that went through so many layers and that the half type moves by `noise`."""
    float32 = float32_tolerance(manifest.dims, layers)
    if manifest.precision is Precision.FP32:
        return float32
    return half_tolerance(float32, noise, manifest.precision)


def layers_before(component: Component, output: str, vision_layers: int) -> int:
    """Layers of its own component that an output went through.

    Args:
        component: The component.
        output: Its name.
        vision_layers: Depth of the vision encoder.
    """
    if component.role is not Role.DECODER:
        return vision_layers if component.role is Role.VISION else 1
    if output.startswith(_CACHES):
        return int(output.split(".")[1]) - component.layer_range.start + 1
    return len(component.layer_range)


def output_tolerance(
    manifest: Manifest,
    component: Component,
    output: TensorSpec,
    *,
    vision_layers: int,
    noise: float = 0.0,
    tokens: CutTokens | None = None,
) -> Tolerance:
    """What an output of one component may differ, given the same inputs.

    Args:
        manifest: The bundle's.
        component: The component.
        output: One of its outputs.
        vision_layers: Depth of the vision encoder.
        noise: How far PyTorch in the graphs' half type is from PyTorch in float32; 0 for float32 graphs.
        tokens: What a prune component's chooser looks at.
    """
    if output.dtype == "int64":
        return INTEGERS
    if component.role is Role.PRUNE and component.chooser is not None:
        if output.name == "scores" and tokens is not None:
            return score_tolerance(component.chooser, tokens, manifest.degree)
        return EXACT
    if component.role is Role.EMBED and manifest.precision is Precision.FP32:
        return EXACT
    return tolerance_of(manifest, layers_before(component, output.name, vision_layers), noise)


def score_tolerance(chooser: Chooser, tokens: CutTokens, degree: int) -> Tolerance:
    """How far a graph's scores may be from the exact ones of the same choice.

    Args:
        chooser: What scores.
        tokens: What it looks at.
        degree: Degree of the entropy series.
    """
    if isinstance(chooser, TopK) and tokens.states is not None:
        bound, reason = score_bound(chooser.scorer, tokens.states.float().numpy(), entropy_series(degree))
        return Tolerance(0.0, bound, reason)
    if isinstance(chooser, MaxMin | Coverage):
        width = tokens.hidden.shape[1]
        bound = _WORST_OVER_TYPICAL * _UNIT_FLOAT32 * math.sqrt(width)
        reason = f"cosines of {width} terms in float32: 16 x 2^-24 x sqrt({width})"
        if isinstance(chooser, Coverage) and tokens.states is not None:
            rounding = _WORST_OVER_TYPICAL * _UNIT_FLOAT32
            bound += FIRST_SCORE * (rounding + _importance_error(chooser, tokens, degree))
            reason += f"; importance by a degree {degree} series in float32, measured"
        return Tolerance(0.0, bound, reason)
    return EXACT  # a draw is made of integers


def score_bound(scorer: Scorer, states: NDArray[np.float32], series: EntropySeries) -> tuple[float, str]:
    """How far the graph's score of any of these tokens may be from the exact one.

    For the entropies: with s = ||A||_F the polynomial stands in for -x ln x at each of the H eigenvalues of
    A / s, so the score is off by at most s H e, where e is the polynomial's own largest error on [0, 1]
    (divided by ln H for the released score). Rounding of the float32 Gram matrix adds to it.

    Args:
        scorer: The score.
        states: [visual_tokens, heads, head_dim].
        series: What the graph takes for -x ln x on [0, 1].

    Returns:
        The bound in the score's unit, and the reason.
    """
    exact = states.astype(np.float64)
    heads, width = exact.shape[1], exact.shape[2]
    rounding = _WORST_OVER_TYPICAL * _UNIT_FLOAT32 * math.sqrt(heads * width)
    if scorer is Scorer.NORM:
        bound = rounding * float(np.sqrt((exact**2).sum(axis=(1, 2))).max())
        return bound, "a float32 sum of squares"
    if scorer is Scorer.ORDER2:
        return rounding * heads, "the logarithm of a float32 sum of squares, no polynomial"
    frobenius = _largest_gram_norm(exact, normalise=scorer is Scorer.PAPER)
    scale = 1.0 / math.log(heads) if scorer is Scorer.RELEASED and heads > 1 else 1.0
    polynomial = _largest_polynomial_error(series)
    # -l ln l of eigenvalues far from 1, which only the released score has, rounds in proportion to ln l
    rounding *= 1.0 + abs(math.log(max(frobenius, 1e-30)))
    bound = scale * heads * frobenius * (polynomial + rounding)
    return bound, (
        f"degree {series.degree} polynomial for -x ln x, off by at most {polynomial:.1e} at each of {heads} "
        f"eigenvalues, times the Gram matrix's norm {frobenius:.2g}; plus float32 rounding"
    )


def _importance_error(chooser: Coverage, tokens: CutTokens, degree: int) -> float:
    """How far scores without eigenvalues move importance, doubled: another runtime rounds otherwise."""
    if tokens.states is None:
        return 0.0
    exact = importance(token_scores(tokens.states, chooser.scorer), chooser)
    series = importance(series_scores(tokens.states, chooser.scorer, degree).double(), chooser)
    return 2 * float((exact - series).abs().max())


def _largest_gram_norm(states: NDArray[np.float64], *, normalise: bool) -> float:
    rows = states - states.mean(axis=1, keepdims=True)
    if normalise:
        norms = np.linalg.norm(rows, axis=2, keepdims=True)
        rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    gram = rows @ rows.transpose(0, 2, 1) / states.shape[1]
    return float(np.sqrt((gram**2).sum(axis=(1, 2))).max())


def _largest_polynomial_error(series: EntropySeries) -> float:
    """On a grid that is dense at 0, where -x ln x is hardest."""
    x = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 20001)])
    exact = np.where(x > 0, -x * np.log(np.where(x > 0, x, 1.0)), 0.0)
    return float(np.abs(series(x) - exact).max())
