"""Options of `plan` about pictures and a budget up to the first token, and how proposals are printed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ep_export.cli.console import note, print_table
from ep_export.cli.options import add_options
from ep_export.cli.units import flops_text, ms_text, percent_text
from ep_export.errors import UsageError, UserError

if TYPE_CHECKING:
    from ep_export.checkpoint import ModelConfig
    from ep_export.first_token_budget import Cost, Proposal
    from ep_export.numerics import Weights
    from ep_export.planning import Plan
    from ep_export.policy import Schedule
    from ep_export.targets import Target
    from ep_export.vision_flops import VisionWork

__all__ = [
    "FirstTokenBudget",
    "budget_options",
    "first_token_budget",
    "picture_options",
    "picture_work",
    "print_proposals",
    "proposals_json",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_MOST_PIXELS = 1 << 14  # along a side, as configs may say


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """1280x720."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(value))
        if not sides or not all(0 < int(side) <= _MOST_PIXELS for side in sides.groups()):
            self.fail(f"{value!r} is no size of a picture: give WIDTHxHEIGHT, e.g. 1280x720", param, ctx)
        return int(sides[1]), int(sides[2])


def picture_options(function: _F) -> _F:
    """What the prompt shows."""
    return add_options(
        function,
        click.option(
            "--picture",
            type=_Size(),
            metavar="WxH",
            help="Size of the picture in pixels [640x480; Video-LLaVA: a video].",
        ),
        click.option(
            "--max-pixels",
            type=click.IntRange(1),
            metavar="P",
            help="Scale the picture down to P pixels, width times height, before the model sees it.",
        ),
        click.option(
            "--frames",
            type=click.IntRange(1, 4096),
            metavar="F",
            help="A video of so many frames of that size in place of the picture.",
        ),
        click.option(
            "--visual-tokens",
            type=click.IntRange(1),
            metavar="N",
            help="Visual tokens of the prompt, where no more is known of its pictures.",
        ),
    )


def budget_options(function: _F) -> _F:
    """A bound up to the first token."""
    return add_options(
        function,
        click.option(
            "--first-token-ms",
            type=click.FloatRange(0, min_open=True),
            metavar="MS",
            help="With --target: propose pairs of --max-pixels and --keep that take at most so long, at "
            "best; without --keep the plan is the best of them.",
        ),
        click.option(
            "--first-token-flops",
            type=click.FloatRange(0, min_open=True),
            metavar="F",
            help="The same within so many FLOPs, e.g. 2e12; needs no --target.",
        ),
    )


def picture_work(model: ModelConfig, name: str, options: Mapping[str, Any]) -> tuple[VisionWork, str]:
    """What the prompt asks of the vision encoder, and in words.

    Raises:
        UsageError: Options that exclude each other, or videos where there are none.
        UserError: The checkpoint's processor file is broken.
    """
    from ep_export.families.picture_sizes import scaled_size
    from ep_export.first_token import tokens_work, typical_work
    from ep_export.vision_flops import VisionWork

    size, frames, most = options["picture"], options["frames"], options["max_pixels"]
    if options["visual_tokens"]:
        if size or frames or most:
            raise UsageError(
                "--visual-tokens and --picture, --frames or --max-pixels exclude each other",
                hint="give --picture WxH alone: its visual tokens follow",
            )
        work = tokens_work(model, options["visual_tokens"])
        return work, f"{work.visual_tokens} visual tokens"
    settings = _settings(model, name, video=bool(frames))
    if not (size or frames or most):
        work = typical_work(model, settings)
        parts = len(work.calls)
        return work, "one picture of 640 x 480" if parts == 1 else f"a video of {parts} frames"
    size = scaled_size(size or _typical(), most or _MOST_PIXELS**2)
    tower = model.family.vision_tower(model.config)
    if frames:
        calls = model.family.video_calls(size, frames, model.config, settings)
        return VisionWork(tower, calls), f"a video of {frames} frames of {_pixels(size)}"
    call = model.family.picture_call(size, model.config, settings)
    return VisionWork(tower, (call,)), f"one picture of {_pixels(size)}"


@dataclass(frozen=True)
class FirstTokenBudget:
    """A bound up to the first token.

    Attributes:
        value: In milliseconds or FLOPs.
        milliseconds: Which of the two.
        cost: Of a plan, in the same unit.
    """

    value: float
    milliseconds: bool
    cost: Cost

    def text(self, value: float) -> str:
        """A value in the budget's unit."""
        return ms_text(value) if self.milliseconds else flops_text(value)

    def proposals(
        self,
        model: ModelConfig,
        name: str,
        schedule: Schedule,
        text_tokens: int,
        options: Mapping[str, Any],
    ) -> tuple[Proposal, ...]:
        """Pairs that meet it.

        Raises:
            UsageError: The prompt is no single picture.
        """
        from ep_export.families.picture_sizes import scaled_size
        from ep_export.first_token_budget import propose

        if options["visual_tokens"] or options["frames"]:
            raise UsageError(
                "a budget up to the first token is about one picture", hint="give --picture WxH, or nothing"
            )
        size = scaled_size(options["picture"] or _typical(), options["max_pixels"] or _MOST_PIXELS**2)
        return propose(
            model,
            size,
            schedule,
            text_tokens=text_tokens,
            settings=_settings(model, name, video=False),
            cost=self.cost,
            budget=self.value,
        )

    def best(self, proposals: Sequence[Proposal]) -> Proposal:
        """The pair that leaves the layers most visual tokens to look at.

        Raises:
            UserError: There is none.
        """
        if not proposals:
            raise UserError(
                f"no picture size and keep reach the first token within {self.text(self.value)}",
                hint="allow more, prune at an earlier --layer, or take a smaller model or lighter --weights",
            )
        return max(proposals, key=lambda proposal: proposal.seen)

    def picture(self, proposal: Proposal) -> str:
        """What the proposal shows, in words."""
        return f"one picture scaled to {_pixels(proposal.size)}"


def first_token_budget(
    options: Mapping[str, Any],
    target: Target | None,
    *,
    new_tokens: int,
    weights: Weights | None,
    kv_bytes: int,
) -> FirstTokenBudget | None:
    """What `budget_options` collected; None where neither was given.

    Raises:
        UsageError: Both, or milliseconds without a target that has figures.
    """
    from ep_export.fit import estimate

    ms, flops = options["first_token_ms"], options["first_token_flops"]
    if ms is None and flops is None:
        return None
    if ms is not None and flops is not None:
        raise UsageError(
            "--first-token-ms and --first-token-flops exclude each other", hint="give one of them"
        )
    if flops is not None:
        return FirstTokenBudget(flops, False, lambda plan: plan.first_token.pruned)
    if target is None or target.bandwidth_bytes_per_second is None:
        raise UsageError(
            "--first-token-ms needs a --target whose figures are known",
            hint="add e.g. --target jetson-orin-nx-16gb, or give --first-token-flops 2e12",
        )

    def milliseconds(plan: Plan) -> float:
        guess = estimate(plan, target, new_tokens=new_tokens, weights=weights, kv_bytes_per_element=kv_bytes)
        return 1e3 * guess.pruned.first_token_seconds if guess else 0.0

    return FirstTokenBudget(ms, True, milliseconds)


def proposals_json(budget: FirstTokenBudget, proposals: Sequence[Proposal]) -> dict[str, Any]:
    """What a budget adds to the JSON of a plan."""
    return {
        "budget": {"first_token_ms" if budget.milliseconds else "first_token_flops": budget.value},
        "proposals": [
            {
                "max_pixels": proposal.max_pixels,
                "picture": proposal.size,
                "visual_tokens": proposal.plan.visual_tokens,
                "keep": proposal.keep,
                "kept_visual_tokens": proposal.plan.kept_visual_tokens[-1],
                "average_visual_tokens": proposal.seen,
                "first_token_flops": proposal.plan.first_token.pruned,
                "first_token_ms": proposal.cost if budget.milliseconds else None,
            }
            for proposal in proposals
        ],
    }


def print_proposals(budget: FirstTokenBudget, proposals: Sequence[Proposal]) -> None:
    """A line a pair; the one that leaves most to look at is marked."""
    if not proposals:
        note(f"no picture size and keep reach the first token within {budget.text(budget.value)}")
        return
    best = budget.best(proposals)
    print_table(
        f"first token within {budget.text(budget.value)}",
        ("--max-pixels", "picture", "--keep", "visual tokens", "seen by a layer, on average", "first token"),
        [
            (
                str(proposal.max_pixels),
                _pixels(proposal.size),
                percent_text(proposal.keep).replace(" ", ""),
                f"{proposal.plan.visual_tokens} -> {proposal.plan.kept_visual_tokens[-1]}",
                f"{proposal.seen:.0f}" + (" (most)" if proposal is best else ""),
                budget.text(proposal.cost),
            )
            for proposal in proposals
        ],
    )
    note("which pair answers best depends on model and pictures: `ep-export sweep --max-pixels` measures it")


def _settings(model: ModelConfig, name: str, *, video: bool) -> Mapping[str, Any]:
    """Of the processor in a checkpoint's directory; nothing where the model is a name."""
    from ep_export.first_token import processor_settings

    directory = Path(name).expanduser()
    return processor_settings(model, directory, video=video) if directory.is_dir() else {}


def _typical() -> tuple[int, int]:
    from ep_export.families.base import TYPICAL_PICTURE

    return TYPICAL_PICTURE


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
