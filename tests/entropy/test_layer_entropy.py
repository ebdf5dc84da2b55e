from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ep_export.entropy import layer_entropy, layer_spectrum


def draw(tokens: int, width: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(("tokens", "width"), [(40, 12), (12, 40), (20, 20)])
def test_dual_and_primal_have_the_same_spectrum(tokens: int, width: int) -> None:
    states = draw(tokens, width)
    size = min(tokens, width)
    dual, primal = layer_spectrum(states, dual=True), layer_spectrum(states, dual=False)
    torch.testing.assert_close(dual[-size:], primal[-size:], atol=1e-12, rtol=0)
    assert dual[:-size].abs().sum() < 1e-12
    assert primal[:-size].abs().sum() < 1e-12
    assert len(layer_spectrum(states)) == size


def test_entropy_is_that_of_singular_values_in_numpy() -> None:
    states = draw(30, 18)
    x = states.double().numpy()
    x = x - x.mean(axis=0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    sigma = np.linalg.svd(x, compute_uv=False) ** 2 / 30
    assert sigma.sum() == pytest.approx(1)
    assert layer_entropy(states) == pytest.approx(-(sigma * np.log(sigma)).sum(), abs=1e-12)


def test_known_entropies() -> None:
    assert layer_entropy(torch.ones(5, 7)) == 0.0
    assert layer_entropy(torch.ones(1, 7)) == 0.0
    # a cross around its mean: two directions, equally strong
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert layer_entropy(cross) == pytest.approx(math.log(2))
    line = torch.arange(6.0)[:, None] * torch.ones(1, 3)
    assert layer_entropy(line) == pytest.approx(0.0, abs=1e-9)


def test_state_that_is_not_finite_gives_nan() -> None:
    states = draw(5, 4)
    states[1, 1] = math.inf
    assert math.isnan(layer_entropy(states))
