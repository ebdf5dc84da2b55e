"""A model with everything that measuring it needs, and the settings that decide the numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ep_export.errors import UserError, reason
from ep_export.families.picture_sizes import scaled_picture
from ep_export.measure.spelling import Speller
from ep_export.measure.ways import Way
from ep_export.methods import Method, method_named
from ep_export.policy import Nothing, Random
from ep_export.runtime.pictures import open_picture
from ep_export.weights.store import stored_layers

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from ep_export.checkpoint import Checkpoint
    from ep_export.families.base import DecoderModules, PromptBuilder, PromptInputs
    from ep_export.measure.question import Question

__all__ = [
    "Bench",
    "RoundedModel",
    "Setting",
    "build_prompt",
    "check_device",
    "gpus_of",
    "make_bench",
    "shown_picture",
    "with_setting",
]


@dataclass(frozen=True)
class RoundedModel:
    """A model with rounded weights, measured beside the one with full weights.

    Attributes:
        name: Its name in results, e.g. "int4"; see `on_weights`.
        shard: Of its quantised layers; the file's name says what is in it (see
            `ep_export.calibrate.weights.rounded_shard`).
    """

    name: str
    shard: str


@dataclass(frozen=True)
class Setting:
    """What is measured, and all that decides the numbers besides the model and the questions.

    Attributes:
        ways: What is compared.
        draws: Of a way that leaves a choice to chance.
        seed: Of the draws.
        max_new_tokens: Longest answer of the unpruned model.
        device: Where torch runs, e.g. "cpu" or "cuda"; "auto" spreads the model over all GPUs that this
            process sees, "auto:N" says besides how many GPUs a worker of a cluster gets.
        entropies: Measure the layer entropies of every picture, with the first question about it.
        metrics: And with them the layer metrics.
        max_pixels: Pictures with more are scaled down first; None asks about them as they are.
        rounded: Shard of quantised layers whose dequantised weights take the place of the checkpoint's; its
            name says what is in it (see `ep_export.calibrate.weights.rounded_shard`).
        beside: Models that every way is measured on as well, each compared with the unpruned model of full
            weights. Each is loaded besides.
    """

    ways: tuple[Way, ...]
    draws: int
    seed: int
    max_new_tokens: int
    device: str
    entropies: bool = True
    metrics: bool = False
    max_pixels: int | None = None
    rounded: str | None = None
    beside: tuple[RoundedModel, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers before which anything is cut, ascending."""
        return tuple(sorted({cut.layer for way in self.ways for cut in way.cuts}))

    @property
    def looks(self) -> bool:
        """Whether any cut looks at what it chooses from, rather than drop tokens at random or all of them."""
        choosers = [method_named(cut.method).chooser for way in self.ways for cut in way.cuts]
        return not all(isinstance(chooser, Random | Nothing) for chooser in choosers)

    def draws_of(self, way: Way) -> int:
        """How often a way is measured on a question: once, unless it leaves a choice to chance."""
        return self.draws if any(method_named(cut.method).chance for cut in way.cuts) else 1


@dataclass(frozen=True)
class Bench:
    """What stays the same from question to question.

    Attributes:
        checkpoint: The model's.
        setting: What is measured.
        model: The unpruned model.
        decoder: Its decoder.
        builder: Its prompts.
        speller: Its tokenizer.
        methods: By name, every method of the ways.
        beside: By name, the same with rounded weights; see `Setting.beside`.
    """

    checkpoint: Checkpoint
    setting: Setting
    model: PreTrainedModel
    decoder: DecoderModules
    builder: PromptBuilder
    speller: Speller
    methods: dict[str, Method] = field(repr=False)
    beside: dict[str, Bench] = field(default_factory=dict, repr=False)


def make_bench(checkpoint: Checkpoint, setting: Setting) -> Bench:
    """Load the model and what belongs to it: float32 on a CPU, the checkpoint's own number type elsewhere.

    Raises:
        UserError: The device or a weight is missing.
    """
    check_device(setting.device)
    model = _load(checkpoint, setting.device, setting.rounded)
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    bench = Bench(
        checkpoint=checkpoint,
        setting=setting,
        model=model,
        decoder=checkpoint.family.decoder(model),
        builder=builder,
        speller=Speller(checkpoint.path, builder.eos_token_ids),
        methods=_methods(setting),
    )
    models = {one.name: _load(checkpoint, setting.device, one.shard) for one in setting.beside}
    decoder = checkpoint.family.decoder
    beside = {name: replace(bench, model=one, decoder=decoder(one)) for name, one in models.items()}
    return replace(bench, beside=beside)


def _load(checkpoint: Checkpoint, device: str, rounded: str | None) -> PreTrainedModel:
    from ep_export.reference import load_model

    dtype = torch.float32 if device == "cpu" else getattr(torch, checkpoint.dtype)
    layers = stored_layers([Path(rounded)]) if rounded else None
    if _is_spread(device):
        return load_model(checkpoint, dtype=dtype, quantised=layers, device_map="auto")
    return load_model(checkpoint, dtype=dtype, quantised=layers).to(device)


def with_setting(bench: Bench, setting: Setting) -> Bench:
    """The same loaded model for another setting on the same device."""
    beside = {name: with_setting(one, setting) for name, one in bench.beside.items()}
    return replace(bench, setting=setting, methods=_methods(setting), beside=beside)


def _methods(setting: Setting) -> dict[str, Method]:
    names = {cut.method for way in setting.ways for cut in way.cuts}
    return {name: method_named(name) for name in sorted(names)}


def check_device(device: str) -> None:
    """Refuse a device that torch does not have.

    Raises:
        UserError: There is no such device.
    """
    if _is_spread(device):
        gpus_of(device)
        return
    try:
        torch.empty(1).to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        message = f"device {device} cannot be used: {reason(error)}"
        raise UserError(message, hint="leave --device out to run on the CPU") from error


def gpus_of(device: str) -> int:
    """How many GPUs one worker needs.

    Raises:
        UserError: "auto:" is followed by no number.
    """
    if not _is_spread(device):
        return 0 if device == "cpu" else 1
    count = device.partition(":")[2] or "1"
    if not (count.isascii() and count.isdigit() and int(count)):
        raise UserError(f"device {device} names no number of GPUs", hint="write it as auto:2")
    return int(count)


def _is_spread(device: str) -> bool:
    return device.partition(":")[0] == "auto"


def shown_picture(bench: Bench, question: Question) -> Image.Image:
    """The question's picture as the model is to see it.

    Raises:
        UserError: It cannot be read.
    """
    picture, most = open_picture(question.picture.path), bench.setting.max_pixels
    return picture if most is None else scaled_picture(picture, most)


def build_prompt(bench: Bench, question: Question) -> PromptInputs:
    """The question's prompt.

    Raises:
        UserError: The picture cannot be read, or the question not be asked.
    """
    prompt = bench.builder.build([shown_picture(bench, question)], question.text)
    if not len(prompt.visual_index):
        raise UserError("the prompt holds no visual tokens")
    return prompt
