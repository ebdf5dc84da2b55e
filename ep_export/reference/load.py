"""Load a checkpoint as the Hugging Face model it was saved from, ready to be the oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from ep_export.checkpoint.packed_layers import read_packed
from ep_export.errors import UserError
from ep_export.safetensors_index import read_tensor
from ep_export.weights.store import StoredLinear, read_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ep_export.checkpoint import Checkpoint

__all__ = ["load_model"]


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    *,
    quantised: Mapping[str, StoredLinear] | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
) -> PreTrainedModel:
    """Load the model from its local directory: safetensors only, no code from the checkpoint, no network.

    Attention is `sdpa` on purpose: it computes in the model's own type, so that a float64 oracle is float64
    throughout, where Hugging Face's `eager` rounds every softmax to float32; and it never holds the S x S
    scores of a long prompt.

    Args:
        checkpoint: An opened checkpoint.
        dtype: Weights are converted to it; bfloat16 and float16 weights widen exactly to float32.
        quantised: Linear layers of a bundle (see `bundle_layers`), whose dequantised weights take the place
            of the checkpoint's: a bundle is judged by its arithmetic, not by its rounding.
        device_map: Spread the modules over devices with accelerate: "auto", or module name -> device, as
            Hugging Face's `from_pretrained` takes it. What passes from one layer to the next lies on the
            first device, so that layers can be run one by one. None: everything on the CPU.

    Returns:
        The model in eval mode, its parameters without gradients.

    Raises:
        UserError: A weight the model needs is missing or has another shape; accelerate is missing, or the
            checkpoint is one that it cannot spread.
    """
    if device_map is not None:
        _check_spreading(checkpoint)
    if checkpoint.published is not None:
        return _assembled(checkpoint, dtype, quantised)
    from transformers import AutoModelForImageTextToText

    with _no_progress_bar():
        model, info = AutoModelForImageTextToText.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            device_map=device_map,
        )
    mismatched = (entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    wrong = sorted({*info["missing_keys"], *mismatched})
    if wrong:
        # Hugging Face fills such weights with random numbers: an oracle must not.
        raise UserError(
            f"checkpoint {checkpoint.path} lacks weights in the model's shapes: {', '.join(wrong[:3])}",
            hint="download the checkpoint again; every shard of its index must be there",
        )
    if quantised:
        _dequantise(model, quantised)
    if device_map is not None:
        _return_to_first_device(checkpoint, model)
    return model.eval().requires_grad_(requires_grad=False)


def _check_spreading(checkpoint: Checkpoint) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "accelerate, which spreads a model over devices, is not installed",
            hint="pip install 'ep-export[accelerate]'",
        )
    if checkpoint.published is not None:
        raise UserError(
            f"checkpoint {checkpoint.path} is quantised, and cannot be spread over devices",
            hint="give one device, e.g. cuda, or the unquantised checkpoint",
        )


def _return_to_first_device(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Accelerate's hooks bring inputs to a module; these bring its output back to where they came from."""
    decoder = checkpoint.family.decoder(model)
    for module in (*decoder.layers, decoder.norm, decoder.lm_head):
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.io_same_device = True


def _assembled(
    checkpoint: Checkpoint, dtype: torch.dtype, quantised: Mapping[str, StoredLinear] | None
) -> PreTrainedModel:
    """A quantised checkpoint with its dequantised weights, without the packages that would run it packed."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    model = AutoModelForImageTextToText.from_config(
        checkpoint.config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters |= dict(model.named_buffers())
    with torch.no_grad():
        for name, ref in checkpoint.tensors.items():
            parameters[name].copy_(torch.from_numpy(read_tensor(ref).astype(np.float32)))
        for name, layer in checkpoint.packed.items():
            parameters[name].copy_(torch.from_numpy(read_packed(layer).dequantised()).T)
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    if quantised:
        _dequantise(model, quantised)
    loaded: PreTrainedModel = model.eval().requires_grad_(requires_grad=False)
    return loaded


def _dequantise(model: PreTrainedModel, quantised: Mapping[str, StoredLinear]) -> None:
    """Put dequantised weights into linear layers; an embedding that shares one keeps its own numbers."""
    linears = {id(each.weight): each for each in model.modules() if isinstance(each, torch.nn.Linear)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in quantised.items():
        linear = linears[id(parameters[name])]
        weight = torch.from_numpy(read_layer(stored).dequantised()).T.contiguous()
        linear.weight = torch.nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Only the command line draws; Hugging Face's loading bar would end up in its logs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
