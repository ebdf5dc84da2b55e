"""Opening checkpoints: what is there is found and renamed, what is wrong is refused with one sentence."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny

from ep_export.checkpoint import Checkpoint, open_checkpoint, open_config
from ep_export.errors import UserError

INDEX = "model.safetensors.index.json"
DECODER_TENSOR = "model.language_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("plain"), layers=2)


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """A checkpoint to break: its own files, cheap to make."""
    path = tmp_path / "model"
    path.mkdir()
    for file in plain.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def header_of(file: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file: Path, header: object, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def bytes_of(checkpoint: Checkpoint, name: str) -> np.ndarray:
    ref = checkpoint.tensors[name]
    with ref.file.open("rb") as stream:
        stream.seek(ref.offset)
        return np.frombuffer(stream.read(ref.length), dtype=ref.dtype).reshape(ref.shape)


def test_every_tensor_is_found_where_the_safetensors_library_finds_it(plain: Path) -> None:
    checkpoint = open_checkpoint(str(plain))
    expected = load_file(plain / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(bytes_of(checkpoint, name), tensor.numpy())
    assert (checkpoint.dtype, checkpoint.dims.layers, checkpoint.family.name) == ("float32", 2, "qwen2_5_vl")
    names = {file.name for file in checkpoint.processor_files}
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= names


def test_published_names_and_shards_give_the_same_checkpoint(plain: Path, tmp_path: Path) -> None:
    sharded = make_tiny(tmp_path / "old", layers=2, max_shard_size=100_000, old_layout=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    old, new = open_checkpoint(str(sharded)), open_checkpoint(str(plain))
    assert set(old.tensors) == set(new.tensors)
    assert old.tensors[DECODER_TENSOR].name == "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(bytes_of(old, DECODER_TENSOR), bytes_of(new, DECODER_TENSOR))
    assert old.fingerprint == new.fingerprint


def test_fingerprint_changes_with_one_weight_and_with_the_config(copy: Path) -> None:
    before = open_checkpoint(str(copy)).fingerprint
    edit_config(copy, tie_word_embeddings=True)
    assert open_checkpoint(str(copy)).fingerprint != before
    edit_config(copy, tie_word_embeddings=False)
    edit_tensors(copy, lambda t: t[DECODER_TENSOR].__setitem__((0, 0), 7.0))
    assert open_checkpoint(str(copy)).fingerprint != before


def test_tied_checkpoint_may_leave_lm_head_out(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_tiny(tmp_path / "tied", layers=2, tie_embeddings=True)))
    assert "lm_head.weight" not in checkpoint.tensors
    assert "model.language_model.embed_tokens.weight" in checkpoint.tensors


def test_untied_checkpoint_may_not(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.pop("lm_head.weight"))
    fails(copy, "lacks tensor lm_head.weight")


def test_hub_cache_is_used_without_a_network(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--acme--tiny-vl", "0" * 40
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for file in plain.iterdir():
        blob = repo / "blobs" / f"blob-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    from huggingface_hub import snapshot_download

    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *a, **k: snapshot_download(*a, **{**k, "cache_dir": tmp_path}),
    )
    checkpoint = open_checkpoint("acme/tiny-vl")
    assert checkpoint.revision == commit
    assert checkpoint.path == snapshot


@pytest.mark.parametrize(
    ("alias", "layers", "hidden", "heads", "kv_heads", "vocab"),
    [
        ("qwen2.5-vl-3b", 36, 2048, 16, 2, 151936),
        ("qwen2.5-vl-7b", 28, 3584, 28, 4, 152064),
        ("qwen2.5-vl-32b", 64, 5120, 40, 8, 152064),
        ("qwen2.5-vl-72b", 80, 8192, 64, 8, 152064),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 28, 3584, 28, 4, 152064),
    ],
)
def test_aliases_have_their_config_without_a_network(
    alias: str, layers: int, hidden: int, heads: int, kv_heads: int, vocab: int
) -> None:
    dims = open_config(alias).dims
    assert (dims.layers, dims.hidden_size, dims.heads, dims.kv_heads, dims.vocab_size) == (
        layers,
        hidden,
        heads,
        kv_heads,
        vocab,
    )
    assert dims.head_dim == 128


def fails(path: Path | str, *fragments: str) -> None:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(path))
    text = f"{caught.value} | {caught.value.hint}"
    assert caught.value.hint
    assert "\n" not in text
    for fragment in fragments:
        assert fragment in text


def test_missing_empty_and_file_paths_are_refused(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "no model directory", "check the path")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "is empty")
    (tmp_path / "file").write_text("")
    fails(tmp_path / "file", "is a file, expected a model directory")


def test_misspelt_alias_suggests_the_right_one() -> None:
    fails("qwen2.5-vl-7", "did you mean", "qwen2.5-vl-7b")


def test_uncached_hub_id_says_how_to_fetch_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args: object, **_options: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    fails("acme/no-such-model", "could not be fetched", "hf download acme/no-such-model")
    with pytest.raises(UserError, match="could not be fetched"):
        open_config("acme/no-such-model")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [("{", "not readable JSON"), ("[]", "expected an object"), ("{}", "names no model_type")],
)
def test_broken_config_is_refused(copy: Path, content: str, fragment: str) -> None:
    (copy / "config.json").write_text(content)
    fails(copy, "config.json", fragment)


def test_missing_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    fails(copy, "no config.json")


def test_unsupported_family_names_the_supported(copy: Path) -> None:
    edit_config(copy, model_type="llama")
    fails(copy, "'llama'", "supported: qwen2_5_vl")


def test_quantized_checkpoint_is_refused(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "awq"})
    fails(copy, "quantized")


def test_config_with_impossible_numbers_is_refused(copy: Path) -> None:
    text = json.loads((copy / "config.json").read_text())["text_config"]
    edit_config(copy, text_config={**text, "num_attention_heads": 3})
    fails(copy)


def test_pickled_weights_are_refused_with_a_way_to_convert(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    fails(copy, "holds no model.safetensors", "safe_serialization=True")


def test_missing_extra_and_misshapen_tensors_are_named(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.pop(DECODER_TENSOR))
    fails(copy, "lacks tensor", DECODER_TENSOR)
    edit_tensors(copy, lambda t: t.update({DECODER_TENSOR: torch.zeros(64, 65)}))
    fails(copy, DECODER_TENSOR, "[64, 65]", "expected [64, 64]")
    edit_tensors(copy, lambda t: t.update({DECODER_TENSOR: torch.zeros(64, 64, dtype=torch.int32)}))
    fails(copy, DECODER_TENSOR, "int32")
    edit_tensors(
        copy,
        lambda t: t.update(
            {DECODER_TENSOR: torch.zeros(64, 64), "model.language_model.layers.2.extra": torch.zeros(1)}
        ),
    )
    fails(copy, "model.language_model.layers.2.extra", "unknown")


def test_truncated_and_padded_shards_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    fails(copy, "truncated", str(len(whole)))
    file.write_bytes(whole + b"0")
    fails(copy, "longer than its header says")
    file.write_bytes(whole[:5])
    fails(copy, "no whole safetensors file")
    file.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    fails(copy, "no whole safetensors file")


def test_corrupt_headers_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    header, data = header_of(file)
    first = next(name for name in header if name != "__metadata__")
    entry = header[first]
    for change, fragment in (
        ({"dtype": "F12"}, "F12"),
        ({"shape": [-1]}, "expected sizes"),
        ({"shape": [1, 1]}, "need"),
        ({"data_offsets": [0]}, "expected sizes"),
        ({"data_offsets": [v + 8 for v in entry["data_offsets"]]}, "expected"),  # type: ignore[attr-defined]
    ):
        write_header(file, {**header, first: {**entry, **change}}, data)
        fails(copy, first, fragment)
    write_header(file, {**header, first: 3}, data)
    fails(copy, first, "no description")
    write_header(file, b"not json at all", data)
    fails(copy, "broken safetensors header")
    write_header(file, b'{"a": {}, "a": {}}', data)
    fails(copy, "'a' appears twice")
    write_header(file, b"[]   ", data)
    fails(copy, "no JSON object")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "sharded", layers=2, max_shard_size=200_000)


def edit_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_missing_shard_is_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[-1]
    victim.unlink()
    fails(sharded, victim.name, "is missing")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin"])
def test_index_that_leaves_the_directory_is_refused(sharded: Path, name: str) -> None:
    edit_index(sharded, lambda m: m.update({DECODER_TENSOR: name}))
    fails(sharded, name, "plain name")


def test_index_and_shards_must_agree(sharded: Path) -> None:
    shards = sorted({*json.loads((sharded / INDEX).read_text())["weight_map"].values()})
    edit_index(sharded, lambda m: m.update({"no.such.tensor": shards[0]}))
    fails(sharded, "no.such.tensor", "does not hold it")


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    fails(sharded, name, "in two shards")


def test_index_without_a_weight_map_is_refused(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"a": 3}}')
    fails(sharded, "no weight_map")
