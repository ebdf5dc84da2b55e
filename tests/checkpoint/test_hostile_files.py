"""Checkpoint files from another hand: whatever they hold, the answer is one sentence and a hint."""

import json
import shutil
import struct

import pytest
from tiny import make_tiny

from ep_export.checkpoint import open_checkpoint, open_config
from ep_export.errors import UserError
from ep_export.safetensors_index import read_shard, read_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("plain"), layers=2)


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "model")


def refused(call, *arguments, said):
    with pytest.raises(UserError, match=said) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value).replace(said, "")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"model_type": "llava", "vocab_size": NaN}', "NaN is no number"),
        ('{"model_type": "llava", "vocab_size": 1e400}', "too large"),
        ('{"model_type": "llava", "x": -Infinity}', "no number"),
        ('{"model_type": "llava", "x": "\\ud800"}', "surrogates not allowed"),
        ("null", "NoneType, expected an object"),
        ("[]", "list, expected an object"),
        ("\xff", "is no valid|Expecting value|names no model_type"),
    ],
)
def test_a_config_that_is_no_plain_json_object(copy, text, said):
    (copy / "config.json").write_text(text)
    refused(open_checkpoint, str(copy), said=said)


def change(path, keys, value):
    file = path / "config.json"
    raw = json.loads(file.read_text())
    part = raw
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**400, 1.5, "x", True, [1, 2], {}])
@pytest.mark.parametrize(
    "keys",
    [
        ("text_config", "num_hidden_layers"),
        ("text_config", "num_attention_heads"),
        ("text_config", "num_key_value_heads"),
        ("text_config", "hidden_size"),
        ("text_config", "intermediate_size"),
        ("text_config", "vocab_size"),
        ("vision_config", "depth"),
        ("vision_config", "num_heads"),
        ("vision_config", "patch_size"),
        ("vision_config", "spatial_merge_size"),
        ("vision_config", "temporal_patch_size"),
        ("vision_config", "window_size"),
        ("vision_config", "tokens_per_second"),
    ],
    ids=lambda keys: keys[-1],
)
def test_a_size_that_is_none_is_named(copy, keys, value):
    change(copy, keys, value)
    refused(open_config, str(copy), said=".".join(keys))


@pytest.mark.parametrize("value", [10**9, 1.5, "x", -1])
def test_a_head_width_that_is_none_is_named(copy, value):
    change(copy, ("text_config", "head_dim"), value)
    refused(open_config, str(copy), said="head_dim")


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("text_config",), [], "no valid|expected an object"),
        (("text_config",), 7, "text_config 7, expected an object"),
        (("vision_config",), "x", "vision_config 'x', expected an object"),
        (("text_config", "model_type"), [[]], "text_config.model_type"),
        (("text_config",), {}, "three sizes"),  # transformers' own defaults, without rotary sections
        (("text_config", "rope_parameters", "mrope_section"), "x", "three sizes"),
        (("text_config", "rope_parameters", "mrope_section"), None, "three sizes"),
        (("text_config", "rope_parameters", "mrope_section"), [8], "three sizes"),
        (("text_config", "rope_parameters", "mrope_section"), [-4, 6, 6], "three sizes"),
        (("text_config", "rope_parameters"), {}, "three sizes|rope"),
        (("vision_config", "window_size"), 1, "at least a merge block"),
        (("text_config", "hidden_act"), "no-such-function", "does not make a model"),
    ],
)
def test_other_values_that_no_model_has(copy, keys, value, said):
    change(copy, keys, value)
    refused(open_checkpoint, str(copy), said=said)


def write_shard(file, header):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    return file


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]},
        {"dtype": {"F32": 1}, "shape": [], "data_offsets": [0, 4]},
        {"dtype": None, "shape": [], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**49], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0] * 9, "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [10**4000] * 10_000, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**30]},
    ],
    ids=lambda entry: str(entry)[:50],
)
def test_an_entry_of_a_shard_that_is_no_tensor(tmp_path, entry):
    refused(read_shard, write_shard(tmp_path / "a.safetensors", {"w": entry}), said="tensor w")


def test_a_header_nested_without_end(tmp_path):
    refused(read_shard, write_shard(tmp_path / "a.safetensors", b"[" * 10_000), said="nested too deeply")


@pytest.mark.parametrize(
    "name",
    [
        "a" * 400 + ".safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "\x1b[31m.safetensors",
        "../a.safetensors",
        "/etc/a.safetensors",
        "..\\a.safetensors",
        "pipe",
        "",
    ],
    ids=lambda name: ascii(name)[:20],
)
def test_a_shard_name_that_is_no_plain_file_name(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    refused(read_tensors, tmp_path, said="expected the plain name")


def test_a_lone_surrogate_in_the_index(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"w": "\\ud800.safetensors"}}')
    refused(read_tensors, tmp_path, said="not readable JSON")


def test_a_shard_that_is_a_link_to_itself(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"w": "a.safetensors"}}')
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "a.safetensors")
    refused(read_tensors, tmp_path, said=r"a\.safetensors .*is missing")


@pytest.mark.parametrize(
    "name", ["no\0thing", "loop", "x" * 5000, "\ud800", "a\nb", "~nobody"], ids=lambda name: ascii(name)[:20]
)
def test_a_model_path_that_leads_nowhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for opened in (open_config, open_checkpoint):
        refused(opened, name, said="is no model directory")
