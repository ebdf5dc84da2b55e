"""Opening a checkpoint: an alias, a hub id or a directory becomes one checked, frozen description.

Enters: what a person typed. Leaves: `ModelConfig` (the config alone, enough for a plan) or `Checkpoint`
(config plus where every tensor lies). Everything that can be wrong with the files is found here, before
any long work starts. Weights are never read, pickles never opened, remote code never run.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_export.aliases import ALIASES, find_alias
from ep_export.checkpoint.packed_layers import PACKED, PackedLayer, split_layers
from ep_export.dims import DecoderDims
from ep_export.documents import read_json_object
from ep_export.errors import UserError, as_user_error, near_matches
from ep_export.families import family_of, refuse_by_name
from ep_export.families.base import Family
from ep_export.families.bounds import check_dims, check_sizes
from ep_export.garbage import collector_paused
from ep_export.safetensors_index import TensorRef, read_tensors
from ep_export.weights.published import Published, read_published

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Checkpoint", "ModelConfig", "open_checkpoint", "open_config"]

_PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""The plain data files of processors. Nothing else of a checkpoint is taken along: no code."""

_HUB_SECONDS = 5.0  # of patience with the first answer
_SAMPLE_BYTES = 4096
_FETCH = "fetch the checkpoint again"


@dataclass(frozen=True)
class ModelConfig:
    """What the config alone says.

    Attributes:
        source: What was asked for.
        revision: Commit of a hub checkpoint when known.
        config: transformers' own config object.
        family: The model family.
        dims: The decoder's dimensions.
        published: Layout of a quantised checkpoint; None where it is none.
    """

    source: str
    revision: str | None
    config: PreTrainedConfig
    family: Family
    dims: DecoderDims
    published: Published | None


@dataclass(frozen=True)
class Checkpoint(ModelConfig):
    """A checkpoint whose files were checked.

    Attributes:
        path: Its directory.
        dtype: Type most of its bytes have: "bfloat16", "float16" or "float32".
        tensors: Parameter name in today's Hugging Face model -> where its data lies.
        packed: Likewise for weights of linear layers that are stored quantised.
        fingerprint: SHA-256 over the config, every tensor's name, dtype and shape, and samples of its data
            (the whole of small tensors; first, middle and last 4 KiB of large ones): tells checkpoints
            apart in milliseconds at any size, whatever the sharding. It is no integrity check; bundles
            carry full checksums of the shards.
        processor_files: Tokenizer and processor files, config.json included.
    """

    path: Path
    dtype: str
    tensors: Mapping[str, TensorRef]
    packed: Mapping[str, PackedLayer]
    fingerprint: str
    processor_files: tuple[Path, ...]

    @property
    def origin(self) -> str:
        """What finds it again from anywhere: its alias or hub id, or its directory, absolute."""
        local = _path(self.source)
        return self.source if local is None else str(self.path)


def open_config(model: str, *, revision: str | None = None) -> ModelConfig:
    """The config of an alias (works offline), a hub id or a local directory.

    Raises:
        UserError: Unknown name, no config, broken config, or an unsupported family.
    """
    alias = find_alias(model)
    path = _path(model)
    if path is not None and path.is_dir():
        file = path / "config.json"
    elif alias is not None and revision is None:
        file = alias.config_file
    else:
        file = _hub_config(alias.hub_id if alias else model, model, revision)
    return _model_config(model, _commit(file.parent), file)


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open and check a checkpoint.

    Args:
        model: Alias, hub id or local directory.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: See the functions called; each names the file or tensor, what it found and expected.
    """
    with collector_paused():
        return _open(model, revision)


def _open(model: str, revision: str | None) -> Checkpoint:
    path = _locate(model, revision)
    config = _model_config(model, _commit(path), path / "config.json")
    on_disk = read_tensors(path)

    from ep_export.checkpoint.meta_model import meta_model
    from ep_export.checkpoint.tensor_names import match_tensors

    published = config.published
    plain, found = split_layers(on_disk, published) if published else (on_disk, {})
    model = meta_model(config.config)
    matched = match_tensors(plain, model)
    tensors = {name: ref for name, ref in matched.items() if ref.dtype != PACKED}
    packed = {
        name: PackedLayer(ref.name.removesuffix(".weight"), published, found[ref.name], _in_out(model, name))
        for name, ref in matched.items()
        if ref.dtype == PACKED and published is not None
    }
    return Checkpoint(
        source=config.source,
        revision=config.revision,
        config=config.config,
        family=config.family,
        dims=config.dims,
        path=path,
        dtype=_main_dtype(tensors),
        published=published,
        tensors=tensors,
        packed=packed,
        fingerprint=_fingerprint(
            read_json_object(path / "config.json", hint=_FETCH),
            {**tensors, **{ref.name: ref for layer in packed.values() for ref in layer.parts.values()}},
        ),
        processor_files=tuple(path / name for name in _PROCESSOR_FILES if (path / name).is_file()),
    )


def _model_config(source: str, revision: str | None, file: Path) -> ModelConfig:
    if not file.is_file():
        raise UserError(
            f"{file.parent} has no config.json", hint="give the directory of a Hugging Face checkpoint"
        )
    raw = read_json_object(file, hint=_FETCH)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{file} names no model_type", hint="give the directory of a Hugging Face checkpoint")
    family = family_of(model_type)
    quantization = raw.pop("quantization_config", None)
    published = read_published(quantization, source=source) if quantization else None
    from transformers import CONFIG_MAPPING

    check_sizes(raw, str(file))
    with as_user_error(f"{file} is no valid {model_type} config", hint="fetch it again"):
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    dims = family.dims(config)
    check_dims(dims, str(file))
    return ModelConfig(source, revision, config, family, dims, published)


def _in_out(model: PreTrainedModel, name: str) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer by the name of its weight."""
    outputs, inputs = model.get_parameter(name).shape
    return int(inputs), int(outputs)


def _locate(model: str, revision: str | None) -> Path:
    path = _path(model)
    if path is not None and path.is_dir():
        if not any(path.iterdir()):
            raise UserError(f"model directory {path} is empty", hint="give the directory of a checkpoint")
        return path.resolve()
    if path is not None:
        raise UserError(f"{path} is a file, expected a model directory", hint="give the directory it lies in")
    alias = find_alias(model)
    return _hub_snapshot(alias.hub_id if alias else model, model, revision)


def _path(model: str) -> Path | None:
    """What was asked for as a path, where something lies there; None for names that no path can have."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long; a null byte; the home of nobody
        return None


def _hub_snapshot(hub_id: str, asked: str, revision: str | None) -> Path:
    """Directory of a hub checkpoint: from the cache when whole there, else fetched if that is allowed."""
    _refuse_non_id(hub_id, asked)
    from huggingface_hub import snapshot_download

    wanted = [*_PROCESSOR_FILES, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]

    def find(local: bool) -> Path:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=wanted, local_files_only=local)
        )

    try:
        cached = find(True)
        read_tensors(cached)
        if (cached / "config.json").is_file():
            return cached
    except (UserError, OSError, ValueError):
        pass  # not cached, or only in part: the next attempt says what is wrong
    try:
        _ask_hub(hub_id, revision)
        return find(False)
    except (OSError, ValueError) as error:
        raise _not_fetched(hub_id, revision, error) from error


def _hub_config(hub_id: str, asked: str, revision: str | None) -> Path:
    _refuse_non_id(hub_id, asked)
    from huggingface_hub import hf_hub_download

    def find(local: bool) -> Path:
        return Path(hf_hub_download(hub_id, "config.json", revision=revision, local_files_only=local))

    try:
        return find(True)
    except (OSError, ValueError):
        pass
    try:
        _ask_hub(hub_id, revision)
        return find(False)
    except (OSError, ValueError) as error:
        raise _not_fetched(hub_id, revision, error) from error


def _ask_hub(hub_id: str, revision: str | None) -> None:
    """Fail at once where the hub cannot be reached or has no such model: downloads try for half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:  # the download itself says so
        return
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json", revision=revision), timeout=_HUB_SECONDS)
    except Exception as error:  # of whatever HTTP library serves the hub's client
        raise _not_fetched(hub_id, revision, error) from error


def _refuse_non_id(hub_id: str, asked: str) -> None:
    """A name that can be no hub id is a misspelt alias or a directory that is not there."""
    refuse_by_name(asked)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")) or hub_id.endswith("/"):
        looks_like_path = "/" in asked or asked.startswith((".", "~"))
        hint = "check the path" if looks_like_path else near_matches(asked, (alias.name for alias in ALIASES))
        raise UserError(f"{asked!r} is no model directory, alias or hub id", hint=hint)


def _not_fetched(hub_id: str, revision: str | None, error: BaseException) -> UserError:
    reason = type(error).__name__
    at = f" --revision {revision}" if revision else ""
    return UserError(
        f"{hub_id} is not in the local Hugging Face cache and could not be fetched ({reason})",
        hint=f"where there is a network run `hf download {hub_id}{at}`, or give a local directory",
    )


def _commit(directory: Path) -> str | None:
    """Hub snapshots lie in a directory named by their commit."""
    return directory.name if directory.parent.name == "snapshots" else None


def _main_dtype(tensors: Mapping[str, TensorRef]) -> str:
    weight: Counter[str] = Counter()
    for ref in tensors.values():
        weight[ref.dtype] += ref.length
    return weight.most_common(1)[0][0]


def _fingerprint(config: dict[str, Any], tensors: Mapping[str, TensorRef]) -> str:
    config = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    handles = {file: file.open("rb") for file in {ref.file for ref in tensors.values()}}
    try:
        for name in sorted(tensors):
            ref = tensors[name]
            digest.update(json.dumps([name, ref.dtype, ref.shape]).encode())
            for start, size in _samples(ref):
                handles[ref.file].seek(start)
                digest.update(handles[ref.file].read(size))
    finally:
        for handle in handles.values():
            handle.close()
    return digest.hexdigest()


def _samples(ref: TensorRef) -> tuple[tuple[int, int], ...]:
    if ref.length <= 16 * _SAMPLE_BYTES:
        return ((ref.offset, ref.length),)
    middle, last = ref.offset + ref.length // 2, ref.offset + ref.length - _SAMPLE_BYTES
    return tuple((start, _SAMPLE_BYTES) for start in (ref.offset, middle, last))
