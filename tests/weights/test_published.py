"""What a `quantization_config` says, as published checkpoints spell it, and what is refused by name."""

from __future__ import annotations

import pytest

from ep_export.errors import UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.weights.published import layer_and_part, read_published

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 64,
                "symmetric": True,
            },
        }
    },
    "ignore": ["lm_head"],
}


def channels(kind: str, layout: str, strategy: str = "channel") -> dict:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "group_size": None}
    return {**PACKED, "format": layout, "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("config", "layout", "weights"),
    [
        (AWQ, "awq", Weights(WeightKind.INT4, 128, "awq")),
        ({**AWQ, "group_size": -1}, "awq", Weights(WeightKind.INT4, None, "awq")),
        (GPTQ, "gptq", Weights(WeightKind.INT4, 128, "gptq")),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "gptq_v2", Weights(WeightKind.INT4, 128, "gptq_v2")),
        (PACKED, "pack-quantized", Weights(WeightKind.INT4, 64, "pack-quantized")),
        (
            channels("int", "int-quantized"),
            "int-quantized",
            Weights(WeightKind.INT8, None, "int-quantized"),
        ),
        (
            channels("float", "float-quantized", "tensor"),
            "float-quantized",
            Weights(WeightKind.FP8, None, "float-quantized"),
        ),
    ],
)
def test_layouts_that_are_read(config, layout, weights):
    published = read_published(config, source="model")
    assert (published.layout, published.weights) == (layout, weights)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "modelopt"}, "NVFP4"),
        ({"quant_method": "awk"}, "awk, which is not read"),
        ({}, "a method it does not name"),
        ({**AWQ, "version": "gemv"}, "gemv version"),
        ({**AWQ, "bits": 3}, "3 bits"),
        ({**GPTQ, "bits": 8}, "8 bits"),
        ({**GPTQ, "group_size": 100}, "groups of 100"),
        ({**GPTQ, "group_size": True}, "groups of True"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "format marlin"),
        ({**PACKED, "format": "marlin-24"}, "marlin-24"),
        ({**PACKED, "config_groups": {}}, "in several ways"),
        ({**PACKED, "config_groups": {"group_0": {"weights": None}}}, "in several ways"),
        (channels("float", "float-quantized", "block"), "scaled by block"),
        (channels("int", "pack-quantized"), "int of 8 bits"),
    ],
)
def test_others_are_refused_with_the_way_out(config, message):
    with pytest.raises(UserError, match=message) as caught:
        read_published(config, source="model")
    assert "--weights int4" in caught.value.hint


def test_a_layers_tensors_are_told_from_others():
    parts = read_published(AWQ, source="model").parts
    assert layer_and_part("model.layers.0.mlp.up_proj.qweight", parts) == (
        "model.layers.0.mlp.up_proj",
        "qweight",
    )
    assert layer_and_part("model.layers.0.input_layernorm.weight", parts) is None
    assert layer_and_part("qweight", parts) is None
