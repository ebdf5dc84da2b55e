"""A model spread over devices by accelerate gives the numbers of the whole one. Here over memory and disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from measuring import bench_of, question_about
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.measure.ask import measure
from ep_export.measure.ways import one_cut
from ep_export.policy import Keep
from ep_export.reference import load_model

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed: make test-ray"
)

WAYS = [one_cut(layer, method, Keep(ratio=0.75)) for layer, method in ((1, "fastv"), (2, "norm-lowest"))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return open_checkpoint(str(make_tiny(tmp_path_factory.mktemp("spread") / "tiny")))


@needs_accelerate
def test_layers_on_disk_answer_bit_for_bit_as_the_whole_model(checkpoint, tmp_path: Path) -> None:
    tiny_picture(112, 84).save(tmp_path / "picture.png")
    question = question_about(tmp_path / "picture.png", "What is this?")
    decoder = "model.language_model"
    rest = ("model.visual", f"{decoder}.embed_tokens", f"{decoder}.norm", f"{decoder}.rotary_emb", "lm_head")
    layers = {f"{decoder}.layers.{number}": ("cpu", "disk")[number % 2] for number in range(4)}
    whole = load_model(checkpoint)
    spread = load_model(checkpoint, device_map={**dict.fromkeys(rest, "cpu"), **layers})
    assert spread.model.language_model.layers[1].mlp.up_proj.weight.device.type == "meta"
    results = [measure(bench_of(checkpoint, model, WAYS), question) for model in (whole, spread)]
    assert results[0] == results[1]


def test_without_accelerate_the_error_says_what_to_install(checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="accelerate, which spreads a model") as caught:
        load_model(checkpoint, device_map="auto")
    assert caught.value.hint == "pip install 'ep-export[accelerate]'"
