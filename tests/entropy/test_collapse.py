from __future__ import annotations

import numpy as np
import pytest

from ep_export.entropy import find_collapse, fixed_rule_stages


def curves(mean: list[float], images: int = 24, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # pictures differ as a whole much more than a picture's layers among each other
    return np.array(mean) + rng.normal(0, 0.4, (images, 1)) + rng.normal(0, noise, (images, len(mean)))


def test_sharp_drop_is_found_where_it_is() -> None:
    collapse = find_collapse(curves([3.7, 3.8, 3.3, 3.35, 3.3, 3.32, 3.28, 3.3]))
    assert collapse.layer == 2
    assert collapse.confidence == 1.0
    assert 0 < collapse.drop_low < collapse.drop
    assert collapse.drop == pytest.approx(0.5, abs=0.1)


def test_drop_into_layer_one_is_found() -> None:
    assert find_collapse(curves([4.5, 3.0, 3.1, 3.05])).layer == 1


@pytest.mark.parametrize(
    ("mean", "noise", "reason"),
    [
        ([0.8, 0.9, 1.0, 1.1, 1.2], 0.01, "falls at no layer"),
        ([2.2, 2.2, 2.2, 2.2, 2.2, 2.2], 0.1, "no collapse found"),
        ([3.0, 2.5, 2.0, 1.5, 1.0], 0.05, "no collapse found"),  # falls everywhere alike
        ([3.0, 2.4, 3.0, 2.5, 3.0, 2.5], 0.01, "stand out"),
        ([3.0, 3.0, 2.98, 2.98, 2.98], 0.0001, "small against"),
    ],
)
def test_curves_without_a_collapse_say_so(mean: list[float], noise: float, reason: str) -> None:
    collapse = find_collapse(curves(mean, noise=noise))
    assert collapse.layer is None
    assert reason in collapse.finding
    assert 1 <= collapse.sharpest < len(mean)


def test_pure_noise_is_hardly_ever_a_collapse() -> None:
    found = [find_collapse(curves([3.0] * 8, images=12, seed=seed)).layer for seed in range(40)]
    assert sum(layer is not None for layer in found) <= 2


def test_few_pictures_are_not_enough() -> None:
    collapse = find_collapse(curves([3.7, 3.8, 3.0, 3.0], images=3, noise=0.01))
    assert collapse.layer is None
    assert "3 pictures are too few" in collapse.finding


def test_same_seed_gives_the_same_answer() -> None:
    data = curves([3.7, 3.8, 3.5, 3.4, 3.3], noise=0.3)
    assert find_collapse(data, seed=3) == find_collapse(data, seed=3)


def test_one_layer_or_no_picture_is_refused() -> None:
    for shape in ((5, 1), (0, 4)):
        with pytest.raises(ValueError, match="needs 2 layers and a picture"):
            find_collapse(np.zeros(shape))


def test_fixed_rule_names_every_steep_fall() -> None:
    assert fixed_rule_stages(np.array([4.0, 3.5, 2.2, 2.0, 0.9])) == (2, 4)
    assert fixed_rule_stages(np.array([1.0, 2.0, 3.0])) == ()
