"""The families together: who answers for which checkpoint, and how everything else is refused."""

import json
import shutil

import pytest
from command_line import ep_export
from safetensors.numpy import load_file, save_file
from tiny import make_tiny
from transformers import CONFIG_MAPPING

from ep_export.aliases import ALIASES
from ep_export.checkpoint import open_config
from ep_export.errors import UserError
from ep_export.families import FAMILIES, family_named, family_of, refuse_by_name
from ep_export.families.unsupported import REASONS

SUPPORTED = [kind for family in FAMILIES for kind in family.model_types]


def config_of(model_type):
    return CONFIG_MAPPING[model_type]()


def test_every_model_type_has_one_family():
    assert len(set(SUPPORTED)) == len(SUPPORTED)
    assert not set(SUPPORTED) & set(REASONS)
    for family in FAMILIES:
        assert family_named(family.name) is family
        for kind in family.model_types:
            assert family_of(kind) is family
            assert kind in CONFIG_MAPPING


def test_every_family_has_a_published_shape_to_build():
    """What `tests/bench/bench_export.py --model families` goes through."""
    assert {alias.family for alias in ALIASES} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_every_alias_opens_without_a_network(alias):
    opened = open_config(alias.name)
    assert opened.family.name == alias.family
    assert opened.dims.layers > 8
    assert opened.family.default_visual_tokens(opened.config) > 100


@pytest.fixture
def refused(tmp_path):
    """What `ep-export plan` says about a config.json: one line and a hint."""

    def run(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        result = ep_export("plan", "--model", str(tmp_path), "--keep", "0.5", "--layer", "1")
        assert result.code == 1
        assert result.out == ""
        error, hint = result.err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        return error, hint

    return run


@pytest.mark.parametrize("model_type", REASONS)
def test_known_but_unsupported_models_are_refused_with_their_reason(refused, model_type):
    error, hint = refused({"model_type": model_type})
    assert f"'{model_type}' is not supported: {REASONS[model_type]}" in error
    assert all(kind in hint for kind in SUPPORTED)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "mistral"])
def test_text_only_models_are_refused_as_such(refused, model_type):
    error, hint = refused({"model_type": model_type, "architectures": ["AnyForCausalLM"]})
    assert f"'{model_type}' is a text-only model" in error
    assert "give a vision-language model" in hint


@pytest.mark.parametrize(
    "name", ["qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", "google/gemma-3-4b-it", "HuggingFaceM4/idefics2-8b"]
)
def test_an_unsupported_model_is_refused_by_its_name_too(name):
    with pytest.raises(UserError, match="which is not supported: "):
        refuse_by_name(name)


@pytest.mark.parametrize("name", ["HuggingFaceM4/Idefics3-8B-Llama3", "acme/qwen2.5-vl-tuned", "some/model"])
def test_a_name_of_nothing_unsupported_passes(name):
    assert refuse_by_name(name) is None


@pytest.mark.parametrize(
    ("model_type", "near"),
    [("qwen2_6_vl", "qwen2_5_vl"), ("llava_nxt", "llava_next"), ("smolvlm3", "smolvlm")],
)
def test_unknown_models_get_near_matches(refused, model_type, near):
    error, hint = refused({"model_type": model_type})
    assert f"'{model_type}' is not a supported family" in error
    assert f"did you mean {near}" in hint


def test_a_model_like_nothing_known_gets_the_list(refused):
    _, hint = refused({"model_type": "xyzzy"})
    assert all(kind in hint for kind in SUPPORTED)


def test_a_config_without_a_model_type_is_refused(refused):
    error, _ = refused({"hidden_size": 64})
    assert "names no model_type" in error


class TestReasonsAreTrue:
    """What a refusal claims about a model, read from transformers' own configs and classes."""

    @pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe"])
    def test_deepstack(self, model_type):
        assert len(config_of(model_type).vision_config.deepstack_visual_indexes) == 3

    @pytest.mark.parametrize("model_type", ["aya_vision", "cohere2_vision", "gemma3", "gemma3n"])
    def test_sliding_windows(self, model_type):
        kinds = config_of(model_type).get_text_config().layer_types
        assert kinds.count("sliding_attention") > len(kinds) / 2

    @pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
    def test_linear_attention(self, model_type):
        kinds = config_of(model_type).get_text_config().layer_types
        assert kinds.count("linear_attention") > len(kinds) / 2

    def test_convolutions(self):
        from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

        text = config_of("lfm2_vl").get_text_config()
        assert text.model_type == "lfm2"
        assert not hasattr(Lfm2ShortConv(text, 0), "k_proj")

    def test_cross_attention(self):
        assert config_of("mllama").text_config.cross_attention_layers

    def test_chunks_and_missing_positions(self):
        text = config_of("llama4").get_text_config()
        assert text.attention_chunk_size
        assert 0 in text.no_rope_layers

    @pytest.mark.parametrize("model_type", ["chameleon", "emu3"])
    def test_codes(self, model_type):
        assert config_of(model_type).vq_config is not None

    @pytest.mark.parametrize("model_type", ["blip-2", "instructblip"])
    def test_q_former(self, model_type):
        assert config_of(model_type).qformer_config is not None

    def test_perceiver(self):
        assert config_of("idefics2").perceiver_config is not None

    @pytest.mark.parametrize("model_type", ["florence2", "pix2struct"])
    def test_encoder_decoder(self, model_type):
        assert config_of(model_type).is_encoder_decoder

    def test_pixtral(self):
        assert config_of("mistral3").vision_config.model_type == "pixtral"

    def test_several_vision_layers(self):
        assert len(config_of("vipllava").vision_feature_layer) > 1

    @pytest.mark.parametrize("model_type", ["qwen2_5_omni", "qwen3_omni_moe"])
    def test_larger_model(self, model_type):
        assert config_of(model_type).thinker_config.audio_config is not None

    @pytest.mark.parametrize(
        "model_type",
        ["internlm_xcomposer2", "internvl_chat", "minicpmv", "phi3_v", "llava_llama", "llava_qwen"],
    )
    def test_transformers_itself_has_no_code_for_it(self, model_type):
        assert model_type not in CONFIG_MAPPING


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("registry") / "tiny", layers=2, vision_depth=1)


@pytest.mark.parametrize("verb", ["build", "export"])
def test_a_checkpoint_without_its_vision_weights_is_refused(tiny, tmp_path, verb):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "visual" not in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    result = ep_export(verb, "--model", str(copy), "--keep", "0.5", "--layer", "1", "--out", str(out))
    assert result.code == 1
    error, hint = (line for line in result.err.splitlines() if line.startswith(("error:", "hint:")))
    assert "holds none of the" in error
    assert error.endswith("tensors of model.visual")
    assert "give the whole checkpoint" in hint
    assert not out.exists()


def test_a_bundle_of_an_unknown_family_says_to_upgrade():
    with pytest.raises(UserError, match="'nova_vl' is unknown") as caught:
        family_named("nova_vl")
    assert "upgrade" in caught.value.hint
