"""A Hugging Face model without weights: shapes on the `meta` device.

Building one takes milliseconds and no memory at any size; it is what the checkpoint's tensor names are
checked against and what the exporter traces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ep_export.errors import as_user_error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["meta_model"]


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The image-text-to-text model of a config, on `meta`, in evaluation mode, float32.

    Raises:
        UserError: The config's numbers do not make a model, or this transformers has no such class.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    sentence = f"the config of model_type {config.model_type!r} does not make a model"
    hint = "fetch the checkpoint's config.json again, or upgrade transformers"
    with as_user_error(sentence, hint=hint), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False).eval()
