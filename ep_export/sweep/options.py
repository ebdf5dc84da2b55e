"""What a sweep compares, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from ep_export.calibrate.run import DEFAULT_MAX_NEW_TOKENS
from ep_export.measure.executors import Executor
from ep_export.methods import METHODS, Method
from ep_export.numerics import Weights
from ep_export.policy import Schedule
from ep_export.sweep.recommended import Calibration

__all__ = ["SweepOptions"]


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep compares and how much of it.

    Attributes:
        keeps: Averages over layers.
        layers: Layers K; `auto_layers` of every keep when None.
        methods: Competitors.
        schedule: A schedule that is compared besides, its shares scaled to every keep.
        weights: Rounded weights that every way is measured on besides the full ones; how they are rounded
            `sweep_weights` says.
        seeds: Draws of a method of chance.
        calibration: Where the recommended schedule comes from; None leaves it out.
        max_questions: A random sample of so many.
        max_pixels: Pictures with more are scaled down first, in whatever way tokens are then pruned.
        max_new_tokens: Longest answer of the unpruned model.
        timed_prompts: Prompts whose prefill is timed; 0 for none.
        gallery_pictures: Pictures of the gallery.
        seed: Of every random choice.
        device: Where torch runs.
        executor: Who asks the questions; this process when None.
    """

    keeps: tuple[float, ...]
    layers: tuple[int, ...] | None = None
    methods: tuple[Method, ...] = METHODS
    schedule: Schedule | None = None
    weights: tuple[Weights, ...] = ()
    seeds: int = 3
    calibration: Calibration | None = None
    max_questions: int | None = None
    max_pixels: int | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    timed_prompts: int = 4
    gallery_pictures: int = 8
    seed: int = 0
    device: str = "cpu"
    executor: Executor | None = None
