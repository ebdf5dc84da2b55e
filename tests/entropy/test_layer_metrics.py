"""Every layer metric against its definition in NumPy, float64, and on tokens whose value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ep_export.entropy import METRICS, LayerTokens
from ep_export.entropy.layer_entropy import layer_spectrum
from ep_export.entropy.nuclear_norm import matrix_nuclear_norm
from ep_export.entropy.schur import schur_entropy
from ep_export.entropy.truncated import spectrum_elbow, truncated_entropy
from ep_export.entropy.vendi import vendi_score


def draw(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def entropy(eigenvalues: np.ndarray) -> float:
    positive = eigenvalues[eigenvalues > 1e-15]
    return float(-(positive * np.log(positive)).sum())


@pytest.mark.parametrize(("tokens", "width"), [(40, 12), (12, 40)])
class TestDefinitions:
    def test_vendi_score_is_the_effective_number_of_tokens(self, tokens: int, width: int) -> None:
        x = draw(tokens, width)
        kernel = cosines(x.double().numpy(), x.double().numpy()) / tokens
        assert vendi_score(x) == pytest.approx(math.exp(entropy(np.linalg.eigvalsh(kernel))), rel=1e-10)

    def test_nuclear_norm_is_the_sum_of_the_largest_column_norms(self, tokens: int, width: int) -> None:
        x = draw(tokens, width)
        rows = x.double().numpy() - x.double().numpy().mean(axis=0)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        columns = np.sort(np.linalg.norm(rows, axis=0))[::-1][: min(tokens, width)]
        assert matrix_nuclear_norm(x) == pytest.approx(columns.sum() / tokens, rel=1e-12)

    def test_schur_entropy_is_that_of_the_schur_complement(self, tokens: int, width: int) -> None:
        x, words = draw(tokens, width), draw(5, width, seed=1)
        i, t = x.double().numpy(), words.double().numpy()
        cross = cosines(i, t)
        schur = cosines(i, i) - cross @ np.linalg.inv(cosines(t, t)) @ cross.T
        assert schur_entropy(x, words) == pytest.approx(
            entropy(np.linalg.eigvalsh(schur / tokens)), abs=1e-10
        )

    def test_truncated_entropy_stops_at_the_point_farthest_from_the_chord(
        self, tokens: int, width: int
    ) -> None:
        spectrum = layer_spectrum(draw(tokens, width) ** 3)
        largest = np.sort(spectrum.numpy())[::-1]
        chord = np.linspace(largest[0], largest[-1], len(largest))
        count = int(np.argmax(chord - largest))
        assert spectrum_elbow(largest.tolist()) == count
        assert truncated_entropy(spectrum) == pytest.approx(entropy(largest[:count]), abs=1e-12)


def test_known_values() -> None:
    assert vendi_score(torch.eye(6)) == pytest.approx(6)
    assert vendi_score(torch.ones(6, 3)) == pytest.approx(1)
    assert matrix_nuclear_norm(torch.ones(6, 3)) == 0
    # a cross around its mean: both columns have norm sqrt(2), four tokens
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert matrix_nuclear_norm(cross) == pytest.approx(2 * math.sqrt(2) / 4)
    assert truncated_entropy(torch.tensor([0.45, 0.45, 0.05, 0.05])) == pytest.approx(-0.9 * math.log(0.45))


def test_the_elbow_of_a_flat_spectrum_leaves_nothing_out() -> None:
    assert spectrum_elbow([0.25] * 4) == 4
    assert spectrum_elbow([1.0]) == 1
    assert spectrum_elbow([0.9, 0.05, 0.05]) == 1


def test_text_that_says_everything_leaves_nothing_and_no_text_leaves_all() -> None:
    x = draw(20, 8)
    assert schur_entropy(x, draw(8, 8, seed=1)) == pytest.approx(0, abs=1e-12)
    assert schur_entropy(x, x[:0]) == pytest.approx(math.log(vendi_score(x)), abs=1e-12)
    words = draw(3, 8, seed=2)
    repeated = torch.cat([words, words])  # the Gram matrix of repeated words has no inverse
    assert schur_entropy(x, repeated) == pytest.approx(schur_entropy(x, words), abs=1e-10)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_a_state_that_is_not_finite_gives_nan(metric) -> None:
    states = draw(9, 4)
    states[2, 1] = math.inf
    assert math.isnan(metric.compute(LayerTokens(states, states, draw(2, 4))))


@pytest.mark.parametrize(
    "metric", [m for m in METRICS if m.key != "nuclear"], ids=lambda metric: metric.key
)  # the nuclear norm looks at columns, which are those of a basis
def test_turning_all_states_alike_changes_nothing(metric) -> None:
    states, words = draw(9, 4).double(), draw(2, 4, seed=1).double()
    turn = torch.linalg.qr(draw(4, 4, seed=3).double()).Q
    turned = metric.compute(LayerTokens(states @ turn, states @ turn, words @ turn))
    assert turned == pytest.approx(metric.compute(LayerTokens(states, states, words)), abs=1e-10)
