"""What `ep-export plan` estimates, as Markdown tables: what fits which Jetson, and time to first token.

Nothing is run: every figure is an estimate of a shipped config on a target's published figures. The first
table is for who has a Jetson and looks for a model; the second shows what pruning saves end to end, beside
what it saves in the decoder alone. `--keep` is that of both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ep_export.checkpoint import ModelConfig, open_config
from ep_export.cli.units import bytes_text, flops_text, ms_text, percent_text
from ep_export.first_token import typical_work
from ep_export.fit import Estimate, estimate
from ep_export.numerics import DEFAULT_GROUP, WeightKind, Weights
from ep_export.planning import Plan, make_plan
from ep_export.policy import Cut, Keep, Schedule
from ep_export.targets import Target, find_target

# Orin Nano 8 GB, Orin NX 16 GB, AGX Orin 32 and 64 GB (JetPack 6), AGX Thor 128 GB (JetPack 7).
JETSONS = {
    "Nano 8": "jetson-orin-nano-8gb",
    "NX 16": "jetson-orin-nx-16gb",
    "AGX 32": "jetson-orin-agx-32gb",
    "AGX 64": "jetson-orin-agx-64gb",
    "Thor 128": "jetson-thor",
}
MODELS = ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2.5-vl-32b", "qwen2-vl-2b", "llava-1.5-7b", "llava-1.5-13b")
MODELS += ("llava-next-vicuna-7b", "llava-onevision-7b", "video-llava-7b", "smolvlm2-2.2b")
KINDS: tuple[WeightKind | None, ...] = (None, WeightKind.INT8, WeightKind.INT4)
TIMED = "jetson-orin-agx-64gb"
LAYER = 2
"""Where tokens are pruned: no model here has its collapse layer much later, and costs hardly depend on it."""
TEXT_TOKENS, NEW_TOKENS = 86, 256


def plan_of(model: ModelConfig, keep: Keep) -> Plan:
    work = typical_work(model)
    return make_plan(
        model.dims,
        Schedule((Cut(LAYER),)),
        keep,
        visual_tokens=work.visual_tokens,
        text_tokens=TEXT_TOKENS,
        vision=work,
    )


def weights_of(kind: WeightKind | None) -> Weights | None:
    group = DEFAULT_GROUP if kind is WeightKind.INT4 else None
    return Weights(kind, group, "nearest") if kind else None


def guess_of(plan: Plan, target: Target, kind: WeightKind | None) -> Estimate:
    guess = estimate(plan, target, new_tokens=NEW_TOKENS, weights=weights_of(kind))
    if guess is None:
        raise SystemExit(f"{target.name} has no figures")
    return guess


def fitting(keep: Keep) -> Iterator[Sequence[str]]:
    """A line a model; for every kind of weights the memory, and the smallest Jetson that has it."""
    targets = {short: find_target(name) for short, name in JETSONS.items()}
    for name in MODELS:
        plan = plan_of(open_config(name), keep)
        yield (f"`{name}`", *(smallest(plan, kind, targets) for kind in KINDS))


def smallest(plan: Plan, kind: WeightKind | None, targets: Mapping[str, Target]) -> str:
    """Of Jetsons in order of their memory the first that fits, and what is needed there."""
    for short, target in targets.items():
        guess = guess_of(plan, target, kind)
        if guess.fits(guess.pruned):
            return f"{bytes_text(guess.pruned.total_bytes)}: {short}"
    return "none"


def timed(keep: Keep) -> Iterator[Sequence[str]]:
    """A line a model: FLOPs and time to the first token, end to end and of the decoder."""
    target = find_target(TIMED)
    for name in MODELS:
        plan = plan_of(open_config(name), keep)
        first, prefill = plan.first_token, plan.prefill_flops
        guess = guess_of(plan, target, WeightKind.INT4)
        yield (
            f"`{name}`",
            str(plan.visual_tokens),
            flops_text(plan.vision_flops),
            f"{flops_text(prefill.full)} -> {flops_text(prefill.pruned)}",
            f"{flops_text(first.full)} -> {flops_text(first.pruned)}",
            f"**{percent_text(1 - first.pruned / first.full)}**",
            percent_text(1 - prefill.pruned / prefill.full),
            " -> ".join(ms_text(1e3 * side.first_token_seconds) for side in (guess.full, guess.pruned)),
        )


def markdown(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--out", type=Path, help="Write there instead of stdout.")
    options = parser.parse_args()
    keep = Keep(ratio=options.keep)
    text = (
        f"Memory at keep {keep} and the smallest Jetson that has it (every larger one does too), by weights; "
        f"estimated by `ep-export plan`, {NEW_TOKENS} new tokens, one picture of 640 x 480, for Video-LLaVA "
        "a video of 8 frames. Nano, NX and AGX are Orin.\n\n"
        + markdown(("model", *(kind.value if kind else "bf16" for kind in KINDS)), fitting(keep))
        + f"\n\nUp to the first token, unpruned -> pruned at keep {keep}; time: at best, on "
        f"{find_target(TIMED).title} with int4 weights, estimated.\n\n"
        + markdown(
            (
                "model",
                "visual tokens",
                "vision encoder",
                "decoder prefill",
                "together",
                "saved end to end",
                "saved in the decoder",
                "time to first token",
            ),
            timed(keep),
        )
        + "\n"
    )
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
