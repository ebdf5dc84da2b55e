"""A Hugging Face model larger than memory: a module's weights are there while it computes, and no longer.

Weights come from the checkpoint's mapped shards and are widened to float32; embedding tables are never read
whole, only the rows asked for. What is computed is what the model of `load_model` computes, bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ep_export.safetensors_index import TensorRef, map_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ep_export.checkpoint import Checkpoint

__all__ = ["StreamedModel"]

_SMALL = 1 << 16
"""Values of a parameter that stays in memory: of a norm, a bias."""


class StreamedModel:
    """A model that reads its weights when it needs them.

    Args:
        checkpoint: Unquantised; its shards must stay as they are.

    Attributes:
        model: In evaluation mode, in float32 on the CPU; parameters that are not there are NaN.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import AutoModelForImageTextToText

        with _EmptyOnMeta():
            model = AutoModelForImageTextToText.from_config(
                copy.deepcopy(checkpoint.config),
                dtype=torch.float32,
                attn_implementation="sdpa",
                trust_remote_code=False,
            )
        self.model: PreTrainedModel = model.eval().requires_grad_(requires_grad=False)
        self._absent: dict[torch.nn.Module, dict[str, TensorRef]] = {}
        self._users: Counter[torch.nn.Module] = Counter()
        tensors = checkpoint.tensors
        for name, module in self.model.named_modules():
            full = {
                own: f"{name}.{own}" if name else own for own, _ in module.named_parameters(recurse=False)
            }
            self._prepare(module, {own: tensors[path] for own, path in full.items() if path in tensors})

    @contextmanager
    def held(self, module: torch.nn.Module) -> Iterator[None]:
        """Keep the weights of a part of the model in memory; they may be changed, and are forgotten after."""
        parts = [part for part in module.modules() if part in self._absent]
        try:
            for part in parts:
                self._enter(part)
            yield
        finally:
            for part in parts:
                self._leave(part)

    def _prepare(self, module: torch.nn.Module, refs: Mapping[str, TensorRef]) -> None:
        if type(module) is torch.nn.Embedding and "weight" in refs:
            _map_rows(module, refs["weight"])
            return
        large = {own: ref for own, ref in refs.items() if math.prod(ref.shape) > _SMALL}
        for own, ref in refs.items():
            setattr(module, own, _absent(ref) if own in large else _read(ref))
        if large:
            self._absent[module] = large
            module.register_forward_pre_hook(self._enter, prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: torch.nn.Module, *_call: Any) -> None:
        self._users[module] += 1
        if self._users[module] == 1:
            for own, ref in self._absent[module].items():
                setattr(module, own, _read(ref))

    def _leave(self, module: torch.nn.Module, *_call: Any) -> None:
        self._users[module] -= 1
        if self._users[module] == 0:
            for own, ref in self._absent[module].items():
                setattr(module, own, _absent(ref))


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters begin as `torch.empty`, and take no memory so; tables that are computed are computed."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def _read(ref: TensorRef) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(map_tensor(ref).astype(np.float32)), requires_grad=False)


def _absent(ref: TensorRef) -> torch.nn.Parameter:
    """Takes no memory, and says where the model is and of which type, which `meta` would not."""
    return torch.nn.Parameter(torch.full((), torch.nan).expand(ref.shape), requires_grad=False)


def _map_rows(embedding: torch.nn.Embedding, ref: TensorRef) -> None:
    """Let an embedding read the rows it needs."""
    table = map_tensor(ref)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(table[ids.numpy()].astype(np.float32))

    embedding.forward = forward  # type: ignore[method-assign, assignment]
    embedding.weight = _absent(ref)
