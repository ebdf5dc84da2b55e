"""What lies where in a checkpoint's safetensors shards, read from their headers alone.

Enters: a directory. Leaves: one `TensorRef` a tensor, every one checked against the size of its file, so
that later stages may point into the shards without looking again. Only `read_tensor` and `map_tensor` look at
data. Format:
https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, raw data).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ep_export.documents import parse_json, read_json_object
from ep_export.errors import UserError, reason
from ep_export.numerics import TYPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "DTYPES",
    "TensorRef",
    "find_shards",
    "map_tensor",
    "read_shard",
    "read_tensor",
    "read_tensors",
]

DTYPES: Mapping[str, tuple[str, int]] = {
    kind.safetensors: (kind.name, kind.bits // 8) for kind in TYPES.values() if kind.safetensors
}
"""dtype of the format -> (our name, bytes per element)."""

_BITS_ALONE = {"float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
_MAX_SIZE = 1 << 48  # of an axis, and of an offset: 256 TiB
_MAX_RANK = 8  # the patch embedding of a video, [d, channels, time, height, width], has 5
_MAX_NAME_BYTES = 255  # of a file, on every file system in use
_FETCH = "fetch the checkpoint again"


@dataclass(frozen=True)
class TensorRef:
    """One tensor inside one shard.

    Attributes:
        name: Its name in the shard's header.
        file: The shard.
        offset: First byte, from the start of the file.
        length: Bytes.
        dtype: "bfloat16", "float32", ...
        shape: Its shape.
    """

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def find_shards(directory: Path) -> tuple[Path, ...]:
    """The .safetensors files that make up the checkpoint, in the order Hugging Face looks for them.

    Raises:
        UserError: None there, weights in another format, or an index that is broken, incomplete or names
            files outside the directory.
    """
    if (directory / _SINGLE).is_file():
        return (directory / _SINGLE,)
    if not (directory / _INDEX).is_file():
        raise UserError(f"{directory} holds no {_SINGLE} and no {_INDEX}", hint=_other_format(directory))
    shards = []
    for name in sorted(set(_weight_map(directory).values())):
        _refuse_escape(directory, name)
        file = directory / name
        if not file.is_file():
            raise UserError(f"shard {name} named by {_INDEX} is missing in {directory}", hint=_FETCH)
        shards.append(file)
    return tuple(shards)


def read_tensors(directory: Path) -> dict[str, TensorRef]:
    """Every tensor of the checkpoint by its name on disk.

    Raises:
        UserError: As `find_shards` and `read_shard`; also a tensor that is in two shards, or is listed in the
            index and absent from its shard.
    """
    tensors: dict[str, TensorRef] = {}
    for file in find_shards(directory):
        for ref in read_shard(file):
            if ref.name in tensors:
                first = tensors[ref.name].file.name
                raise UserError(f"tensor {ref.name} is in two shards, {first} and {file.name}", hint=_FETCH)
            tensors[ref.name] = ref
    if not (directory / _SINGLE).is_file():
        for name, shard in _weight_map(directory).items():
            if name not in tensors or tensors[name].file.name != PurePosixPath(shard).name:
                raise UserError(
                    f"{_INDEX} puts tensor {name} in {shard}, which does not hold it", hint=_FETCH
                )
    if not tensors:
        raise UserError(f"{directory} holds safetensors files without a single tensor", hint=_FETCH)
    return tensors


def read_shard(file: Path) -> tuple[TensorRef, ...]:
    """Every tensor of one file, in the order of their data.

    Raises:
        UserError: Not a whole safetensors file: truncated, a broken header, offsets with gaps or overlaps.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise UserError(
                f"{file} is no whole safetensors file: header of {length} bytes in {size}", hint=_FETCH
            )
        raw = stream.read(length)
    try:
        header = parse_json(raw, unique_keys=True)
    except ValueError as error:
        raise UserError(f"{file} has a broken safetensors header: {reason(error)}", hint=_FETCH) from error
    if not isinstance(header, dict):
        raise UserError(f"{file} has a safetensors header that is no JSON object", hint=_FETCH)
    start = 8 + length
    refs = [_entry(file, name, item, start) for name, item in header.items() if name != "__metadata__"]
    refs.sort(key=lambda ref: (ref.offset, ref.length))
    _check_layout(file, refs, start, size)
    return tuple(refs)


def read_tensor(ref: TensorRef) -> NDArray[Any]:
    """A tensor's values; bfloat16 as ml_dtypes has it, the bits of float8 as uint8."""
    import numpy as np

    kind = _numpy_type(ref)
    with ref.file.open("rb") as stream:
        stream.seek(ref.offset)
        return np.fromfile(stream, dtype=kind, count=ref.length // kind.itemsize).reshape(ref.shape)


def map_tensor(ref: TensorRef) -> NDArray[Any]:
    """As `read_tensor`, but read-only pages of the file, which the system loads and drops as it likes."""
    import numpy as np

    if not ref.length:  # nothing to map
        return read_tensor(ref)
    mapped = np.memmap(ref.file, dtype=_numpy_type(ref), mode="r", offset=ref.offset, shape=ref.shape)
    return mapped.view(np.ndarray)


def _numpy_type(ref: TensorRef) -> np.dtype[Any]:
    import numpy as np

    kind: np.dtype[Any]
    if ref.dtype == "bfloat16":
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    else:
        kind = np.dtype(_BITS_ALONE.get(ref.dtype, ref.dtype))
    return kind


def _weight_map(directory: Path) -> dict[str, str]:
    file = directory / _INDEX
    mapping = read_json_object(file, hint=_FETCH).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise UserError(f"{file} has no weight_map of tensor names to shards", hint=_FETCH)
    return mapping


def _refuse_escape(directory: Path, name: str) -> None:
    """Shards lie directly in the directory; an index from elsewhere must not reach other files."""
    plain = name.isprintable() and not set(name) & set("/\\") and name.endswith(".safetensors")
    if not plain or len(name.encode()) > _MAX_NAME_BYTES:
        raise UserError(
            f"{_INDEX} in {directory} names {name!r}, expected the plain name of a .safetensors file",
            hint="do not use this checkpoint; fetch it again from its publisher",
        )


def _other_format(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin")):
        return (
            "pickled weights are never loaded; convert them once where you trust them: "
            "model.save_pretrained(DIR, safe_serialization=True)"
        )
    return "give a directory with the checkpoint's .safetensors files"


def _entry(file: Path, name: str, item: Any, start: int) -> TensorRef:
    where = f"tensor {name} in {file}"
    if not isinstance(item, dict):
        raise UserError(f"{where} has no description in the header", hint=_FETCH)
    dtype: Any = item.get("dtype")
    shape: Any = item.get("shape")
    span: Any = item.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}", hint=_FETCH)
    if not _sizes(shape) or len(shape) > _MAX_RANK or not _sizes(span) or len(span) != 2:
        raise UserError(f"{where} has shape {shape!r} and data_offsets {span!r}, expected sizes", hint=_FETCH)
    kind, width = DTYPES[dtype]
    expected, found = math.prod(shape) * width, span[1] - span[0]
    if expected != found:
        raise UserError(
            f"{where} has {found} bytes, its shape {shape} and {dtype} need {expected}", hint=_FETCH
        )
    return TensorRef(name, file, start + span[0], found, kind, tuple(shape))


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)


def _check_layout(file: Path, refs: list[TensorRef], start: int, size: int) -> None:
    """Data fills the file without gaps: a hole or overlap is how a malformed file hides something."""
    end = start
    for ref in refs:
        if ref.offset != end:
            raise UserError(
                f"tensor {ref.name} in {file} starts at {ref.offset}, expected {end}", hint=_FETCH
            )
        end += ref.length
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise UserError(f"{file} is {state}: {size} bytes, expected {end}", hint=_FETCH)
