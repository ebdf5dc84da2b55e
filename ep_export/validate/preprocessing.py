"""Preprocessing against transformers' own processor of the checkpoint, wherever that can be constructed.

Bundle and oracle share one prompt builder, so comparing them with each other shows nothing about it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.errors import UserError, as_user_error, reason
from ep_export.families.processor_files import chat_template, load_tokenizer, read_settings
from ep_export.validate.comparison import Comparison, Finding, compare
from ep_export.validate.tolerance import INTEGERS, Tolerance

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import PromptInputs

__all__ = ["OwnProcessor", "compare_preprocessing", "own_processor"]

_REASON = "both scale with Pillow: equal but for less than one of 255 levels"
_PIXELS = Tolerance(0.0, 0.01, _REASON)
_SIZES = ("patch_size", "image_seq_len", "num_image_tokens")  # defaults of these fit one checkpoint each
_PARTS = ("image_processor", "tokenizer", "video_processor", "chat_template")


class OwnProcessor:
    """A checkpoint's processor, as transformers constructs and runs it.

    Args:
        processor: An instance of the class that transformers names for the model type.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, pictures: list[Image.Image], question: str) -> Mapping[str, NDArray[Any]]:
        """Model inputs of pictures, then a question, as one user turn.

        Raises:
            UserError: It refuses them.
        """
        content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": question}]
        with as_user_error("transformers' own processor refuses a prompt", hint="validate another question"):
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = self._processor(images=pictures, text=[text], return_tensors="np")
        return {name: np.asarray(value) for name, value in inputs.items()}


def own_processor(checkpoint: Checkpoint) -> tuple[OwnProcessor | None, str]:
    """Construct it with the parts that need no torchvision: its video half is left out.

    Returns:
        The processor, or None and why it cannot be constructed here.
    """
    import transformers
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    try:
        kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[checkpoint.config.model_type])
        takes = inspect.signature(kind.__init__).parameters
        file = checkpoint.path / "processor_config.json"
        told = read_settings(file) if file.is_file() else {}
        options = {name: value for name, value in told.items() if name in takes and name not in _PARTS}
        missing = [name for name in _SIZES if name in takes and name not in options]
        if missing:
            return None, f"processor_config.json does not say {missing[0]}, which transformers' own needs"
        if "video_processor" in takes:
            options["video_processor"] = None
        tokenizer = load_tokenizer(checkpoint.path)
        images = AutoImageProcessor.from_pretrained(checkpoint.path, backend="pil", local_files_only=True)
        # A processor checks the types of its parts, also of the one that is left out.
        unchecked = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
        template = chat_template(checkpoint.path, tokenizer)
        processor = unchecked(image_processor=images, tokenizer=tokenizer, chat_template=template, **options)
    except (UserError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        return None, reason(error)
    return OwnProcessor(processor), ""


def compare_preprocessing(
    where: str, prompt: PromptInputs, own: Mapping[str, NDArray[Any]] | None, checkpoint: Checkpoint
) -> Finding:
    """One prompt as the bundle's builder makes it against transformers' own.

    Args:
        where: The question's name.
        prompt: From the bundle's prompt builder.
        own: From `OwnProcessor`; None where there is nothing to compare with.
        checkpoint: Whose family says how a prompt becomes model inputs.
    """
    if own is None:
        return Finding("preprocessing", (), _REASON)
    ours = checkpoint.family.reference_inputs(prompt, checkpoint.config)
    comparisons: list[Comparison] = []
    for name, theirs in own.items():
        if name not in ours:
            continue
        tolerance = INTEGERS if theirs.dtype.kind in "iub" else _PIXELS
        comparisons.append(compare(f"{where}, {name}", ours[name].cpu().numpy(), theirs, tolerance))
    return Finding("preprocessing", tuple(comparisons), _REASON)
