"""Decoder prefill and decode, full against pruned, on one exported bundle in one run.

The full and the pruned prompt go through the same head and tail, turn by turn; only the length of
`keep_slots` differs. Prints medians with their spread, the speed-up and what the FLOPs model predicts. Exits
1 when the measured speed-up is below 0.90 of the predicted one, or decoding after pruning is slower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bundles import export_tiny
from tiny import make_tiny

from ep_export.bundle import Bundle
from ep_export.plan import Plan, make_plan
from ep_export.policy import Keep
from ep_export.runtime.base import Value
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeOptions, OnnxRuntimeRunner
from ep_export.runtime.prefill import Components, Timer, empty_caches, past_feeds, step

LIMIT = 0.90
# A decode step reads all weights either way and differs only in cache length: medians within this are equal.
DECODE_NOISE = 1.05
TEXT_BEFORE = 35  # as in LLaVA's prompt


@dataclass(frozen=True)
class Prompt:
    """Random embeddings with a run of visual tokens."""

    length: int
    visual_tokens: int

    def feeds(self, width: int, kept: int) -> dict[str, np.ndarray]:
        """The head's inputs but the caches."""
        rng = np.random.default_rng(0)
        return {
            "inputs_embeds": rng.normal(size=(1, self.length, width)).astype(np.float32),
            "position_ids": np.tile(np.arange(self.length), (3, 1, 1)),
            "visual_index": np.arange(TEXT_BEFORE, TEXT_BEFORE + self.visual_tokens),
            "keep_slots": np.zeros(kept, dtype=np.int64),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--ffn-size", type=int, default=2816)
    parser.add_argument("--layer", type=int, default=2, help="K")
    parser.add_argument("--keep", type=float, default=1 / 3)
    parser.add_argument("--visual-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--decode-steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="bench-prefill-") as root:
        bundle = exported(Path(root), options)
        plan = make_plan(
            bundle.manifest.dims,
            bundle.manifest.policy,
            Keep(ratio=options.keep),
            visual_tokens=options.visual_tokens,
            text_tokens=options.text_tokens,
        )
        return measure(bundle, plan, options)


def exported(root: Path, options: argparse.Namespace) -> Bundle:
    checkpoint = make_tiny(
        root / "checkpoint",
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        ffn_size=options.ffn_size,
        vision_depth=2,
    )
    return export_tiny(checkpoint, root / "bundle", layer=options.layer, keep=options.keep)


def measure(bundle: Bundle, plan: Plan, options: argparse.Namespace) -> int:
    settings = OnnxRuntimeOptions(threads=options.threads)
    names = ("embed_tokens", "decoder_head", "decoder_tail")
    runners = {
        name: OnnxRuntimeRunner(bundle.path / bundle.manifest.component(name).file, settings)
        for name in names
    }
    components = Components(runners, plan.dims, plan.policy.layer)
    prompt = Prompt(options.visual_tokens + options.text_tokens, options.visual_tokens)
    kept = {"full": options.visual_tokens, "pruned": plan.kept_visual_tokens}
    feeds = {name: prompt.feeds(plan.dims.hidden_size, count) for name, count in kept.items()}
    print(
        f"d={plan.dims.hidden_size} L={plan.dims.layers} K={plan.policy.layer} S={prompt.length} "
        f"N={options.visual_tokens} k={plan.kept_visual_tokens}, float32, {options.threads} threads, "
        f"medians of {options.repeat} (quartiles)"
    )
    prefill = interleaved(
        {name: lambda name=name: run_once(components, feeds[name]) for name in kept}, options.repeat
    )
    caches = {name: run_once(components, feeds[name]) for name in kept}
    decode = interleaved(
        {name: lambda name=name: decode_once(components, caches[name], prompt.length) for name in kept},
        options.decode_steps,
    )
    for title, times in (("prefill", prefill), ("decode a token", decode)):
        for name, milliseconds in times.items():
            low, middle, high = statistics.quantiles(milliseconds, n=4)
            print(f"  {title:15} {name:7} {middle:9.2f} ms ({low:.2f} to {high:.2f})")
    return verdict(plan, prefill, decode)


def verdict(plan: Plan, prefill: Mapping[str, list[float]], decode: Mapping[str, list[float]]) -> int:
    measured = statistics.median(prefill["full"]) / statistics.median(prefill["pruned"])
    predicted = plan.prefill_flops.full / plan.prefill_flops.pruned
    slower = statistics.median(decode["pruned"]) / statistics.median(decode["full"])
    print(f"speed-up measured {measured:.3f}, predicted by FLOPs {predicted:.3f}")
    print(f"measured / predicted {measured / predicted:.3f} (at least {LIMIT})")
    print(f"decode pruned / full {slower:.3f} (at most {DECODE_NOISE})")
    return 0 if measured / predicted >= LIMIT and slower <= DECODE_NOISE else 1


def run_once(components: Components, feeds: Mapping[str, np.ndarray]) -> dict[str, Value]:
    head, tail = step(components, feeds, empty_caches(components.dims), (Timer(), "head", "tail"))
    return past_feeds({**head, **tail})


def decode_once(components: Components, caches: Mapping[str, Value], position: int) -> None:
    one = np.zeros(1, dtype=np.int64)
    embeds = components.runners["embed_tokens"].run({"input_ids": np.array([[1]])})
    positions = np.full((3, 1, 1), position)
    feeds = {**embeds, "position_ids": positions, "visual_index": one, "keep_slots": one}
    step(components, feeds, caches, (Timer(), "head", "tail"))


def interleaved(programs: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, so that the machine's mood hits all alike; the first turn warms."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeat + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    raise SystemExit(main())
