"""Decoder prefill and decode, unpruned against pruned at one cut and at two, on exported bundles in one run.

All sides run turn by turn on the same spans. Prints medians with quartiles, the speed-up of prefill beside
what the FLOPs model predicts, and a decode step twice: through the spans alone, as it is, and with the prune
components run in between on a sequence of one token of which one is kept (N = k = 1), as a decoder has to do
that holds its pruning inside. That side runs every prune component as a graph of its own, so it also pays for
the calls. Ratios and differences are taken turn by turn. Exits 1 when a measured speed-up is below 0.95 of
the predicted one, or a decode step with kept tokens cached is slower than with all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bundles import export_tiny, two_cuts
from tiny import make_tiny

from ep_export.bundle import Bundle
from ep_export.families.base import PromptInputs
from ep_export.planning import Plan, make_plan, settled_keep
from ep_export.policy import Cut, Keep, Schedule, TopK
from ep_export.runtime import Components, Continuation, OnnxRuntimeOptions, OnnxRuntimeRunner, Prefill
from ep_export.runtime.components import past_feeds, run_span
from ep_export.runtime.prefill import Timer, run_prefill, run_prune

LIMIT = 0.95
# A decode step reads all weights either way and differs only in cache length: medians within this are equal.
DECODE_NOISE = 1.05
TEXT_BEFORE = 35  # as in LLaVA's prompt


@dataclass(frozen=True)
class Case:
    """A bundle opened without its vision encoder, and what it is asked."""

    name: str
    components: Components
    prompt: PromptInputs
    plan: Plan

    def prefill(self, *, pruned: bool) -> tuple[Prefill, float]:
        """The prefill, and milliseconds of spans and prune components."""
        timer = Timer()
        cuts = (self.plan.schedule, self.plan.kept_visual_tokens) if pruned else None
        prefill = run_prefill(self.components, self.prompt, [], cuts, timer)
        return prefill, timer.ms["prefill"] + timer.ms.get("prune", 0.0)

    def step_with_prunes(self, prefill: Prefill) -> None:
        """A decode step that prunes a sequence of one token at every cut, to that one token."""
        manifest = self.components.manifest
        embed = self.components.runner(manifest.embed)
        arrived = {
            "hidden": embed.run({"input_ids": np.array([[1]])}, on_device=("inputs_embeds",))[
                "inputs_embeds"
            ],
            "position_ids": np.full((manifest.dims.position_axes, 1, 1), self.prompt.next_position),
            "visual_index": np.zeros(1, dtype=np.int64),
        }
        caches = dict(prefill.caches)
        for stage in manifest.stages(self.plan.schedule):
            if stage.cut is not None:
                outputs = run_prune(self.components, stage, arrived, 1)
                arrived |= {
                    "hidden": outputs["kept_hidden"],
                    "position_ids": outputs["kept_position_ids"],
                    "visual_index": outputs["kept_visual_index"],
                }
                continue
            outputs = run_span(self.components, stage, arrived["hidden"], arrived["position_ids"], caches)
            caches |= past_feeds(outputs)
            arrived |= outputs | {"hidden": outputs.get("hidden_states", arrived["hidden"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--ffn-size", type=int, default=2816)
    parser.add_argument("--layer", type=int, default=2, help="K of the one cut, and of the first of two")
    parser.add_argument("--keep", type=float, default=1 / 3, help="of the one cut")
    parser.add_argument("--second", type=int, default=8, help="layer of the second cut")
    parser.add_argument("--shares", type=float, nargs=2, default=(0.4, 0.1), help="of the two cuts")
    parser.add_argument("--visual-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--decode-steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prefill-") as root:
        cases = opened(Path(root), options)
        first = cases[0].plan
        print(
            f"d={first.dims.hidden_size} L={first.dims.layers} N={options.visual_tokens}, "
            f"{options.text_tokens} text tokens, float32, {options.threads} threads; medians (quartiles) of "
            f"{options.repeat} prefills and {options.decode_steps} decode steps, all sides in turn"
        )
        fine = [measure(case, options) for case in cases]
    return 0 if all(fine) else 1


def opened(root: Path, options: argparse.Namespace) -> list[Case]:
    """One checkpoint, exported with one cut and with two."""
    checkpoint = make_tiny(
        root / "checkpoint",
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        ffn_size=options.ffn_size,
        vision_depth=2,
    )
    second = two_cuts(options.layer, options.second, shares=tuple(options.shares))
    schedules = {
        "one cut": (Schedule((Cut(options.layer, TopK()),)), Keep(ratio=options.keep)),
        "two cuts": (second, None),
    }
    settings = OnnxRuntimeOptions(threads=options.threads)
    cases = []
    for name, (schedule, told) in schedules.items():
        keep = settled_keep(told, schedule, layers=options.layers)
        bundle = export_tiny(checkpoint, root / name.replace(" ", "-"), schedule=schedule, keep=keep.ratio)
        plan = make_plan(
            bundle.manifest.dims,
            schedule,
            keep,
            visual_tokens=options.visual_tokens,
            text_tokens=options.text_tokens,
        )
        cases.append(Case(name, components(bundle, settings), question(plan), plan))
    return cases


def components(bundle: Bundle, settings: OnnxRuntimeOptions) -> Components:
    return Components(
        bundle.manifest, lambda component: OnnxRuntimeRunner(bundle.file(component.file), settings)
    )


def question(plan: Plan) -> PromptInputs:
    """Random tokens, a run of which count as visual; no picture is encoded."""
    length = plan.visual_tokens + plan.text_tokens
    ids = np.random.default_rng(0).integers(0, plan.dims.vocab_size, (1, length))
    positions = np.tile(np.arange(length), (plan.dims.position_axes, 1, 1))
    visual = np.arange(TEXT_BEFORE, TEXT_BEFORE + plan.visual_tokens)
    return PromptInputs(ids, positions, visual, next_position=length, pictures=())


def measure(case: Case, options: argparse.Namespace) -> bool:
    """Print one case; whether it holds what the module says."""
    layers = ", ".join(str(cut.layer) for cut in case.plan.schedule.cuts)
    kept = ", ".join(map(str, case.plan.kept_visual_tokens))
    print(f"\n{case.name}: before layer {layers}, {kept} of {case.plan.visual_tokens} visual tokens go on")
    prefills = {
        "spans alone, all tokens": lambda: case.prefill(pruned=False)[1],
        "pruned": lambda: case.prefill(pruned=True)[1],
    }
    prefill = interleaved(prefills, options.repeat)
    full, pruned = case.prefill(pruned=False)[0], case.prefill(pruned=True)[0]
    decode = interleaved(
        {
            "spans alone, all tokens cached": partial(decode_once, case, full),
            "spans alone, kept tokens cached": partial(decode_once, case, pruned),
            "and prune components, N = k = 1": partial(timed, partial(case.step_with_prunes, pruned)),
        },
        options.decode_steps,
    )
    for title, times in (("prefill", prefill), ("decode step", decode)):
        for name, milliseconds in times.items():
            low, middle, high = statistics.quantiles(milliseconds, n=4)
            print(f"  {title:12} {name:32} {middle:9.2f} ms ({low:.2f} to {high:.2f})")
    return verdict(case.plan, list(prefill.values()), list(decode.values()))


def verdict(plan: Plan, prefill: Sequence[list[float]], decode: Sequence[list[float]]) -> bool:
    measured = paired(lambda full, pruned: full / pruned, *prefill)
    predicted = plan.prefill_flops.full / plan.prefill_flops.pruned
    shorter = paired(lambda full, pruned: pruned / full, *decode[:2])
    saved = paired(lambda alone, pruning: pruning - alone, *decode[1:])
    share = saved / statistics.median(decode[2])
    print(f"  prefill speed-up measured {measured:.3f}, predicted by decoder FLOPs {predicted:.3f}")
    print(f"  measured / predicted {measured / predicted:.3f} (at least {LIMIT})")
    print(f"  decode, kept / all tokens cached {shorter:.3f} (at most {DECODE_NOISE})")
    print(
        f"  decode, saved by spans alone {saved:.2f} ms a token, {share:.1%} of a step with prune components"
    )
    return measured / predicted >= LIMIT and shorter <= DECODE_NOISE


def paired(relation: Callable[[float, float], float], first: list[float], second: list[float]) -> float:
    """Median over the turns."""
    return statistics.median(relation(a, b) for a, b in zip(first, second, strict=True))


def decode_once(case: Case, prefill: Prefill) -> float:
    return timed(lambda: Continuation(case.components, prefill).feed(1))


def timed(program: Callable[[], object]) -> float:
    start = time.perf_counter()
    program()
    return 1e3 * (time.perf_counter() - start)


def interleaved(programs: Mapping[str, Callable[[], float]], repeat: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, so that the machine's mood hits all alike; the first turn warms."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeat + 1):
        for name, program in programs.items():
            milliseconds = program()
            if turn:
                times[name].append(milliseconds)
    return times


if __name__ == "__main__":
    raise SystemExit(main())
