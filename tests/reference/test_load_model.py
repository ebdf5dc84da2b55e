"""Loading the oracle: every weight as saved, or an error; nothing drawn, nothing trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny
from transformers.utils import logging

from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.reference import load_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("load") / "checkpoint", layers=3, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_widen_exactly(saved, dtype):
    model = load_model(open_checkpoint(str(saved)), dtype)
    loaded = dict(model.named_parameters())
    for name, tensor in load_file(saved / "model.safetensors").items():
        assert loaded[name].dtype is dtype
        torch.testing.assert_close(loaded[name].double(), tensor.double(), rtol=0, atol=0)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in loaded.values())
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_old_layouts_load_the_same(saved, tmp_path):
    old = make_tiny(tmp_path / "old", layers=3, dtype=torch.bfloat16, old_layout=True)
    expected = dict(load_model(open_checkpoint(str(saved))).named_parameters())
    for name, tensor in load_model(open_checkpoint(str(old))).named_parameters():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_no_bar_is_drawn_and_the_setting_is_left_as_it_was(saved, capfd):
    shown = logging.is_progress_bar_enabled()
    load_model(open_checkpoint(str(saved)))
    assert logging.is_progress_bar_enabled() is shown
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("wrong", ["missing", "shape"])
def test_a_weight_that_hugging_face_would_make_up_is_an_error(saved, tmp_path, wrong):
    broken = make_tiny(tmp_path / "broken", layers=3, dtype=torch.bfloat16)
    tensors = load_file(broken / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    if wrong == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(SimpleNamespace(published=None, path=broken))
