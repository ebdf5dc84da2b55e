"""From the names in a checkpoint to the parameters of today's Hugging Face model, checked one by one.

Old checkpoints use other names (`model.layers.*`, `visual.*`). The renaming is transformers' own, the one
`from_pretrained` applies; nothing is copied here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ep_export.checkpoint.packed_layers import PACKED
from ep_export.errors import UserError
from ep_export.safetensors_index import TensorRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["match_tensors"]

_WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
_HINT = "config.json and the shards do not belong together; fetch the checkpoint again"


def match_tensors(tensors: Mapping[str, TensorRef], model: PreTrainedModel) -> dict[str, TensorRef]:
    """Key the tensors by parameter name of `model` and check that nothing is missing, extra or misshapen.

    Args:
        tensors: By name on disk.
        model: The model of the checkpoint's config, on `meta` (see `ep_export.checkpoint.meta_model`).

    Raises:
        UserError: Names the first tensor that is missing, unknown, of another shape, or not a float weight.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    renamed = _rename(tensors, model)
    stale = {name for name, _ in model.named_buffers()} - set(expected)  # copies of computed buffers, unused
    extra = sorted(set(renamed) - set(expected) - stale)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"checkpoint holds tensor {extra[0]}{more}, unknown to its own config", hint=_HINT)
    missing = sorted(set(expected) - set(renamed) - _tied(model, renamed))
    if missing:
        raise _lacks(missing, expected)
    matched = {name: ref for name, ref in renamed.items() if name in expected}
    for name, ref in matched.items():
        if ref.dtype == PACKED:
            continue
        if ref.shape != expected[name]:
            raise UserError(
                f"tensor {name} has shape {list(ref.shape)}, expected {list(expected[name])}", hint=_HINT
            )
        if ref.dtype not in _WEIGHT_DTYPES:
            raise UserError(
                f"tensor {name} has dtype {ref.dtype}, expected {', '.join(_WEIGHT_DTYPES)}",
                hint="its config.json names no quantization; fetch the checkpoint again",
            )
    return matched


def _lacks(missing: Sequence[str], expected: Iterable[str]) -> UserError:
    """Names the first missing tensor, or the part of the model (its vision tower, say) that is not there."""
    part = ".".join(missing[0].split(".")[:2]) + "."
    whole = [name for name in expected if name.startswith(part)]
    if len(whole) > 1 and set(whole) <= set(missing):
        return UserError(
            f"checkpoint holds none of the {len(whole)} tensors of {part[:-1]}",
            hint="this is one half of the model only; give the whole checkpoint",
        )
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return UserError(f"checkpoint lacks tensor {missing[0]}{more}", hint=_HINT)


def _rename(tensors: Mapping[str, TensorRef], model: PreTrainedModel) -> dict[str, TensorRef]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    renamed: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        key, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is not None:  # a converter splits or fuses tensors: the bytes on disk are not the weight
            raise UserError(
                f"tensor {name} must be rearranged before this model can use it",
                hint="load and save the checkpoint once with transformers: model.save_pretrained(DIR)",
            )
        if key in renamed:
            raise UserError(f"tensors {renamed[key].name} and {name} both stand for {key}", hint=_HINT)
        renamed[key] = ref
    return renamed


def _tied(model: PreTrainedModel, present: Mapping[str, TensorRef]) -> set[str]:
    """Parameters a checkpoint may leave out because they share another's data, either way round."""
    pairs = model.all_tied_weights_keys.items()
    return {a for pair in pairs for a, b in (pair, pair[::-1]) if b in present}
