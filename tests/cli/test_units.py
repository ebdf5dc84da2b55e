"""Quantities as people read them."""

import pytest

from ep_export.cli.units import bytes_text, flops_text, keep_text, ms_text, percent_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1_000, "1.00 kB"),
        (586_000, "586 kB"),
        (999_600, "1.00 MB"),
        (22_400_000, "22.4 MB"),
        (16.6e9, "16.6 GB"),
        (2e15, "2000 TB"),
    ],
)
def test_bytes_step_up_by_thousands(count, text):
    assert bytes_text(count) == text


def test_flops_step_up_alike():
    assert flops_text(3.11e9) == "3.11 GFLOPs"
    assert flops_text(8.804e12) == "8.80 TFLOPs"


@pytest.mark.parametrize(
    ("ms", "text"), [(0.842, "0.84 ms"), (12.34, "12.3 ms"), (291.2, "291 ms"), (1090, "1.09 s")]
)
def test_times_step_up_to_seconds(ms, text):
    assert ms_text(ms) == text


@pytest.mark.parametrize(("share", "text"), [(0.2199, "22 %"), (0.0974, "9.7 %"), (0, "0 %"), (1, "100 %")])
def test_percentages_have_two_digits(share, text):
    assert percent_text(share) == text


def test_a_keep_explains_itself():
    assert keep_text([(2, 0.1)], 0.25) == "10 % after layer 2 = 25 % on average"
    assert keep_text([(2, 0.5), (9, 0.1)], 0.3).startswith("50 % after layer 2, 10 % after layer 9 =")
