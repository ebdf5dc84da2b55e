"""Compile engines ahead of time, without a GPU, and print size and time of every component.

usage: python tests/bench/bench_engines.py small [--targets rtx-ada rtx-blackwell] [--model DIR]
       python tests/bench/bench_engines.py full  [--targets rtx-ada] [--dir build/bench] [--weights int4]

small: the shipped trained model, with one policy of every kind that the target takes. full: embeddings, two
spans of one layer and one prune component of Qwen2.5-VL-7B and LLaVA-1.5-7B, full-size with made-up weights;
the checkpoint is written, compiled and deleted. Engines of quantised weights should be at most 1.1 times what
their spans store.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx_ir as ir
from synthetic import checkpoint_bytes, free_bytes, write_synthetic

from ep_export.aliases import find_alias
from ep_export.bundle import Bundle, Component, Role
from ep_export.checkpoint import open_checkpoint
from ep_export.engine.compile import CompileRequest, compile_bundle
from ep_export.engine.compiler import compile_component
from ep_export.engine.pictures import PictureShapes
from ep_export.engine.profiles import LimitsRequest, component_profiles
from ep_export.engine.sources import compiler_source
from ep_export.engine.worker import Job
from ep_export.engine_record import Limits
from ep_export.export import export_bundle
from ep_export.numerics import rounded_to
from ep_export.policy import (
    Chooser,
    Cut,
    Evidence,
    EvidenceKind,
    Keep,
    MaxMin,
    Nothing,
    Random,
    Schedule,
    Scorer,
    TopK,
)
from ep_export.targets import Target, find_target
from ep_export.weights.packing import nearest
from ep_export.weights.store import bundle_layers

_SHIPPED = Path(__file__).resolve().parents[1] / "fixtures" / "digit-reader"
_MODELS = ("qwen2.5-vl-7b", "llava-1.5-7b")
_LAYERS = 2
_POLICIES: tuple[Chooser, ...] = (*(TopK(scorer) for scorer in Scorer), MaxMin(), Random(), Nothing())
# (fewest, typical, most) visual tokens of a picture, as the published processors make them.
_VISUAL_TOKENS = {"qwen2.5-vl-7b": (4, 391, 1280), "llava-1.5-7b": (576, 576, 576)}
_MOST_OVER_BITS = 1.1
_LIMITS = Limits(
    max_prompt=2048, max_new_tokens=256, max_pixels=1280 * 28 * 28, max_kept_tokens=2048, max_batch=8
)


def small(model: Path, targets: Sequence[Target]) -> None:
    """All components of a real checkpoint."""
    with TemporaryDirectory() as work:
        for target in targets:
            policies = [chooser for chooser in _POLICIES if target.takes_chooser(chooser)]
            bundle = _export(model, Path(work) / target.name, target, policies)
            names = tuple(chooser.name for chooser in policies)
            result = compile_bundle(bundle, CompileRequest(target, LimitsRequest(), policies=names), _say)
            assert result.record is not None
            Bundle.open(bundle.path)  # whole, engines included, as its manifest lists them
            engines = result.record.components
            limits = result.record.limits
            print(f"\n{model.name} for {target.name} (SM {target.sm}), {target.best()}, {_words(limits)}")
            _table({name: (engine.bytes, engine.build_seconds) for name, engine in engines.items()})


def full(targets: Sequence[Target], directory: Path, models: Sequence[str], kind: str) -> bool:
    """Embeddings, spans and the prune component of the published shapes, two layers."""
    directory.mkdir(parents=True, exist_ok=True)
    held = True
    for alias in models:
        for target in targets:
            with TemporaryDirectory(dir=directory) as work:
                held &= _full(alias, target, Path(work), kind)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"\nlargest compiler process: {peak / 1e9:.1f} GB")
    return held


def _full(alias: str, target: Target, work: Path, kind: str) -> bool:
    config = _two_layers(alias)
    checkpoint = work / "checkpoint"
    need, free = checkpoint_bytes(config, checkpoint), free_bytes(work)
    if 2.5 * need > free:
        raise SystemExit(f"{2.5 * need / 1e9:.1f} GB needed in {work.parent}, {free / 1e9:.1f} GB free")
    print(f"{alias}: {need / 1e9:.2f} GB of made-up weights", file=sys.stderr)
    bundle = _export(write_synthetic(checkpoint, config), work / "bundle", target, [TopK()], kind)
    pictures = PictureShapes({}, _VISUAL_TOKENS[alias], 16)
    outcomes = {}
    scratch = work / "sources"
    scratch.mkdir()
    for component in bundle.manifest.components:
        if component.role is Role.VISION:
            continue
        _say(component.name, 0, 1)
        engine = work / f"{component.name}.engine"
        source = compiler_source(bundle, component, target, _LIMITS, scratch, plugin=False)
        job = Job(
            onnx=str(source.absolute()),
            engine=str(engine.absolute()),
            flavour=target.flavour,
            sm=target.sm or "",
            profiles=component_profiles(component, bundle.manifest, _LIMITS, pictures),
        )
        outcome = compile_component(job, component=component.name, target=target)
        outcomes[component.name] = (outcome.bytes, outcome.seconds)
        engine.unlink()
    print(
        f"\n{alias}, {_LAYERS} layers, for {target.name} (SM {target.sm}), {target.best()}, {_words(_LIMITS)}"
    )
    _table(outcomes)
    verdicts = [_within_bits(bundle, span, outcomes[span.name][0]) for span in bundle.manifest.spans]
    return all(verdicts)


def _within_bits(bundle: Bundle, span: Component, engine_bytes: int) -> bool:
    """Whether an engine is hardly larger than what its span stores; only asked of quantised ones."""
    stored = bundle_layers(bundle)
    if not stored:
        return True
    model = ir.load(bundle.file(span.file))
    weights = [value.const_value for value in model.graph.initializers.values()]
    bits = sum(weight.nbytes for weight in weights if isinstance(weight, ir.ExternalTensor))
    ratio = engine_bytes / bits
    verdict = "PASS" if ratio <= _MOST_OVER_BITS else "FAIL"
    print(f"{span.name}: {ratio:.2f} of its {bits / 1e6:.1f} MB, at most {_MOST_OVER_BITS}: {verdict}")
    return ratio <= _MOST_OVER_BITS


def _two_layers(alias: str) -> dict[str, object]:
    """The shipped config with two decoder layers."""
    shipped = find_alias(alias)
    assert shipped is not None
    config = json.loads(shipped.config_file.read_text())
    text = config.get("text_config", config)
    text.update(num_hidden_layers=_LAYERS)
    return config


def _export(
    source: Path, out: Path, target: Target, policies: Sequence[Chooser], kind: str = "none"
) -> Bundle:
    """A bundle of the graphs the target likes best, cut after the first layer."""
    out.mkdir()
    graphs = target.best()
    checkpoint, packing = open_checkpoint(str(source)), None
    if weights := rounded_to(kind):
        packing = nearest(checkpoint.tensors, weights, compute=graphs.precision.value)
    return export_bundle(
        checkpoint,
        out,
        packing=packing,
        schedule=Schedule((Cut(1, policies[0]),)),
        evidence=Evidence(EvidenceKind.TOLD, "a benchmark"),
        keep=Keep(ratio=0.625),
        dialect=graphs.dialect,
        precision=graphs.precision,
        policies=policies[1:],
    )


def _words(limits: Limits) -> str:
    return f"prompts up to {limits.max_prompt} tokens, answers up to {limits.max_new_tokens}"


def _table(engines: Mapping[str, tuple[int, float]]) -> None:
    total = sum(size for size, _ in engines.values()), sum(seconds for _, seconds in engines.values())
    print(f"{'':26}{'engine':>14}{'compiled in':>14}")
    for name, (size, seconds) in {**engines, "together": total}.items():
        print(f"{name:26}{size / 1e6:>11,.1f} MB{seconds:>12.1f} s")


def _say(stage: str, done: int, _total: int) -> None:
    if done == 0:
        print(stage, file=sys.stderr)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=("small", "full"))
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--model", type=Path, default=_SHIPPED)
    parser.add_argument("--models", nargs="+", default=_MODELS, help="of full: aliases")
    parser.add_argument("--weights", default="none", choices=("none", "int8", "int4", "fp8"), help="of full")
    parser.add_argument("--dir", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    if args.size == "small":
        small(args.model, [find_target(name) for name in args.targets or ("rtx-ada", "rtx-blackwell")])
        return 0
    targets = [find_target(name) for name in args.targets or ("rtx-ada",)]
    return 0 if full(targets, args.dir, args.models, args.weights) else 1


if __name__ == "__main__":
    sys.exit(main())
