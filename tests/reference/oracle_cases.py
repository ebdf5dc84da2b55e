"""Tiny models and prompts for the oracle's tests, made once a process."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import open_checkpoint
from ep_export.families import family_of
from ep_export.families.base import PromptInputs
from ep_export.reference import load_model

__all__ = ["Case", "case", "whole_sequence"]

_ROOT = tempfile.TemporaryDirectory(prefix="oracle-cases-")


@dataclass(frozen=True)
class Case:
    """A model and one prompt for it."""

    model: Any
    family: Any
    prompt: PromptInputs

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.family.reference_inputs(self.prompt, self.model.config)

    def greedy(self, tokens: int = 8, **options: Any) -> list[int]:
        """Hugging Face's own generate, nothing of ours around it; never stops early."""
        with torch.inference_mode():
            ids = self.model.generate(
                **self.inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=-1, **options
            )
        return ids[0, self.prompt.input_ids.shape[1] :].tolist()


@functools.cache
def case(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 4,
    sizes: tuple[tuple[int, int], ...] = ((140, 112),),
    seed: int = 0,
) -> Case:
    """A random model with pictures of `sizes` (width, height in pixels) before a short question."""
    model, family, builder = _model(heads, kv_heads, head_dim, layers, seed)
    pictures = [tiny_picture(*size, seed=seed + i) for i, size in enumerate(sizes)]
    return Case(model, family, builder.build(pictures, "which digits are in the picture?"))


@functools.cache
def _model(heads: int, kv_heads: int, head_dim: int, layers: int, seed: int) -> tuple[Any, Any, Any]:
    path = Path(_ROOT.name) / f"{heads}-{kv_heads}-{head_dim}-{layers}-{seed}"
    make_tiny(path, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=layers, seed=seed)
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint)
    family = family_of(model.config.model_type)
    return model, family, family.prompt_builder(path, model.config)


def whole_sequence(oracle: Case, answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [S + T, d] and positions [3, S + T] of the prompt followed by generated ids."""
    inputs, model = oracle.inputs, oracle.model
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(inputs["input_ids"])[0].clone()
        if len(oracle.prompt.visual_index):
            features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            embeds[torch.from_numpy(oracle.prompt.visual_index)] = torch.cat(tuple(features.pooler_output))
            positions, _ = model.model.get_rope_index(
                inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
            )
        else:
            positions = torch.arange(len(embeds)).expand(3, 1, -1)
        appended = model.get_input_embeddings()(torch.tensor(answer, dtype=torch.int64))
    following = int(positions.max()) + 1 + np.arange(len(answer))
    positions = np.concatenate([positions[:, 0].numpy(), np.tile(following, (3, 1))], axis=1)
    return torch.cat([embeds, appended]).numpy(), positions
