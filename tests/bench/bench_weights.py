"""The shipped model with its weights as they are, in 8 and in 4 bits: quality, size, memory and speed.

Quality is that of Hugging Face's model with the weights a bundle holds, dequantised (float8, in which no CPU
computes, is judged so as well): whether greedy decoding gives the exact answer, and how far the predictions
lie from the unquantised model's over its own answer. Size is that of all linear layers. Memory and speed are
a bundle's, each in a process of its own; rounds of all bundles take turns.

Calibrated rounding has to leave at most half of the KL of rounding to the nearest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from digit_scenes import READING, held_out, make_scene, questions

from ep_export.bundle import Bundle
from ep_export.calibrate.weights import ROUNDING_PICTURES, calibrated
from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.export import export_bundle
from ep_export.export.packing import linear_weights
from ep_export.families.base import PromptInputs
from ep_export.measure.full_pass import before_placeholder, run_full
from ep_export.measure.pruned import gap
from ep_export.measure.spelling import Speller, says
from ep_export.numerics import WeightKind, Weights
from ep_export.policy import Cut, Evidence, EvidenceKind, Keep, Schedule
from ep_export.reference import greedy, load_model
from ep_export.weights.packing import Packing, nearest
from ep_export.weights.store import bundle_layers

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
MAX_NEW_TOKENS = 8
ROUNDS = 5


@dataclass(frozen=True)
class Quality:
    """Of one set of weights."""

    right: int
    kl: float


@dataclass(frozen=True)
class Speed:
    """Of one bundle in a process of its own, medians over its rounds."""

    prefill_ms: float
    decode_ms: float
    peak_bytes: int


def packings(checkpoint: Checkpoint, group: int) -> dict[str, Packing | None]:
    """What is compared, by name."""
    scenes = [make_scene("calibration", index=index) for index in range(ROUNDING_PICTURES)]
    asked = [
        [question.text for question in questions(scene) if question.kind in READING][index % 3]
        for index, scene in enumerate(scenes)
    ]
    four = Weights(WeightKind.INT4, group, "nearest")

    def rounded(weights: Weights) -> Packing:
        return nearest(checkpoint.tensors, weights, compute="fp32")

    return {
        "fp32": None,
        "int8": rounded(Weights(WeightKind.INT8, None, "nearest")),
        "int8, vision too": rounded(Weights(WeightKind.INT8, None, "nearest", WeightKind.INT8)),
        "int4 nearest": rounded(four),
        "int4 calibrated": calibrated(
            checkpoint, four, [scene.picture for scene in scenes], asked, compute="fp32"
        ),
        "fp8": rounded(Weights(WeightKind.FP8, None, "nearest")),
    }


def export(checkpoint: Checkpoint, packing: Packing | None, out: Path) -> Bundle:
    """A bundle with these weights."""
    out.mkdir()
    return export_bundle(
        checkpoint,
        out,
        schedule=Schedule((Cut(2),)),
        evidence=Evidence(EvidenceKind.TOLD, "a bench"),
        keep=Keep(ratio=0.25),
        packing=packing,
    )


def linear_bytes(bundle: Bundle, checkpoint: Checkpoint) -> int:
    """Linear layers of decoder and vision encoder, and lm_head, scales included."""
    stored = bundle_layers(bundle)
    names = linear_weights(checkpoint)
    total = 0
    for name in (*names.decoder, names.lm_head, *names.vision):
        if name in stored:
            layer = stored[name]
            total += layer.codes.length + layer.scales.length
        else:
            total += checkpoint.tensors[name].length
    return total


def qualities(
    checkpoint: Checkpoint, bundles: dict[str, Bundle], count: int, pictures_seed: int
) -> dict[str, Quality]:
    """Every model asked the same questions, one model in memory beside the unquantised one."""
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    speller = Speller(checkpoint.path, builder.eos_token_ids)
    asked = [
        (builder.build([scene.picture], question.text), speller.spell(question.answer))
        for scene, question in held_out(count, seed=pictures_seed)
    ]
    plain = load_model(checkpoint)
    own = [_own_answer(plain, checkpoint, prompt, right, speller.end) for prompt, right in asked]
    results = {}
    for name, bundle in bundles.items():
        model = load_model(checkpoint, quantised=bundle_layers(bundle))
        right, kl, positions = 0, 0.0, 0
        for (prompt, spelled), (ids, reference) in zip(asked, own, strict=True):
            predicted = _log_probs(model, checkpoint, prompt, ids)
            kl += gap(reference, predicted).kl
            positions += len(ids)
            told = predicted if ids == spelled else _log_probs(model, checkpoint, prompt, spelled)
            right += says(told, spelled, speller.end)
        results[name] = Quality(right, kl / positions)
        print(f"  {name}: {right} of {count} right, KL {kl / positions:.2e}", file=sys.stderr, flush=True)
    return results


def _own_answer(
    model: torch.nn.Module, checkpoint: Checkpoint, prompt: PromptInputs, right: list[int], end: Sequence[int]
) -> tuple[list[int], torch.Tensor]:
    """The model's greedy answer and its predictions; most often it is the right one: that is tried first."""
    predicted = _log_probs(model, checkpoint, prompt, right)
    if says(predicted, right, end):
        return right, predicted
    ids = greedy(model, checkpoint.family, checkpoint.config, prompt, MAX_NEW_TOKENS)
    ids = before_placeholder(ids, checkpoint.config)
    return ids, _log_probs(model, checkpoint, prompt, ids)


def _log_probs(
    model: torch.nn.Module, checkpoint: Checkpoint, prompt: PromptInputs, answer: Sequence[int]
) -> torch.Tensor:
    return run_full(model, checkpoint.family, prompt, answer, layers=()).log_probs


def speeds(bundles: dict[str, Bundle]) -> dict[str, Speed]:
    """Rounds of all bundles in turn, each in a process that stays open."""
    children = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--child", str(bundle.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, bundle in bundles.items()
    }
    rounds: dict[str, list[Speed]] = {name: [] for name in children}
    for _ in range(ROUNDS + 1):
        for name, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            rounds[name].append(Speed(**json.loads(child.stdout.readline())))
    for child in children.values():
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    return {name: _median(measured[1:]) for name, measured in rounds.items()}


def _median(measured: Sequence[Speed]) -> Speed:
    middle = len(measured) // 2
    return Speed(
        sorted(one.prefill_ms for one in measured)[middle],
        sorted(one.decode_ms for one in measured)[middle],
        max(one.peak_bytes for one in measured),
    )


def child(path: Path) -> None:
    """Answer once a line; everything is imported and loaded before memory is counted."""
    from ep_export.runtime import Session

    scene, question = next(iter(held_out(1, seed=2)))
    with Session.open(Bundle.open(path, verify=False), threads=1) as session:
        for _ in sys.stdin:
            answer = session.generate(
                [scene.picture], question.text, max_new_tokens=16, prune=False, ignore_eos=True
            )
            ms = answer.timings_ms
            print(
                json.dumps(
                    {
                        "prefill_ms": ms["embed"] + ms["prefill"],
                        "decode_ms": ms["decode_per_token"],
                        "peak_bytes": _peak_bytes(),
                    }
                ),
                flush=True,
            )


def _peak_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def _rows(
    qualities: dict[str, Quality], sizes: dict[str, int], speeds: dict[str, Speed], count: int
) -> Iterator[str]:
    columns = f"{'layers':>11}{'peak memory':>13}{'prefill':>10}{'a token':>10}"
    yield f"{'weights':18}{'right':>12}{'KL':>10}{columns}"
    for name, quality in qualities.items():
        speed = speeds.get(name)
        run = (
            f"{speed.peak_bytes / 1e6:>10.0f} MB{speed.prefill_ms:>7.0f} ms{speed.decode_ms:>7.1f} ms"
            if speed
            else f"{'-':>13}{'-':>10}{'-':>10}"
        )
        right = f"{quality.right} of {count}"
        yield f"{name:18}{right:>12}{quality.kl:>10.1e}{sizes[name] / 1e6:>8.1f} MB{run}"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=510)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    checkpoint = open_checkpoint(str(READER))
    with tempfile.TemporaryDirectory(dir=READER.parents[2] / "build") as work:
        bundles = {
            name: export(checkpoint, packing, Path(work) / name.replace(" ", "-"))
            for name, packing in packings(checkpoint, args.group).items()
        }
        sizes = {name: linear_bytes(bundle, checkpoint) for name, bundle in bundles.items()}
        judged = qualities(checkpoint, bundles, args.questions, 2)
        timed = speeds({name: bundle for name, bundle in bundles.items() if name != "fp8"})
    print(
        f"\n{checkpoint.path.name}, {args.questions} held-out questions, groups of {args.group}, one thread"
    )
    print("\n".join(_rows(judged, sizes, timed, args.questions)))
    share = judged["int4 calibrated"].kl / judged["int4 nearest"].kl
    verdict = "PASS" if share <= 0.5 else "FAIL"
    print(f"\ncalibrated rounding leaves {share:.2f} of the KL of nearest, at most 0.50: {verdict}")
    return 0 if share <= 0.5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
