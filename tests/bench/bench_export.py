"""Build bundles of synthetic checkpoints of published shapes and measure it.

usage: python tests/bench/bench_export.py DIR [--model qwen2.5-vl-7b] [--layers 4|28] [--check all|memory]
                                          [--weights int4]
       python tests/bench/bench_export.py DIR --model families --layers 4 --check memory --sparse

Writes a checkpoint into DIR (random bf16 values, streamed and reused when it is there; or, sparse, zeros that
take no disk space and are not hashed), builds it in a fresh process, prints what that took beside the limits,
and exits 1 when one is missed. `families` is one model of every family in turn, a 7B where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from synthetic import checkpoint_bytes, config_of, free_bytes, write_synthetic

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """One build in its own process, interpreter start and imports included."""

    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_anonymous: int
    written: int
    copied: int


@dataclass(frozen=True)
class Limits:
    """What a build may take on 2 cores."""

    seconds: float
    peak_rss: float
    peak_anonymous: float
    written: float = 50e6
    copied: float = 0


LIMITS = {
    ("none", 4): Limits(12, 0.7e9, 0.5e9),
    ("none", 28): Limits(40, 0.7e9, 0.5e9),
    # pages of mapped shards count as resident; the system drops them when it needs the memory
    ("int4", 4): Limits(45, math.inf, 1.5e9, 4.3e9, 1.2e9),
    ("int4", 28): Limits(math.inf, math.inf, 1.5e9, 4.3e9, 4.3e9),
}
"""By weights and layers."""

# Measured earlier, elsewhere on the same kind of machine, on a 4-layer checkpoint of this shape (5.4 GB).
PEERS = (
    ("mobius-onnx 0.1 (f16, three graphs)", "50 s", "1.4 GB anonymous", "5.4 GB"),
    ("onnxruntime-genai 0.18 (fp16, text only)", "10.5 s", "2.7 GB anonymous", "4.1 GB"),
    ("torch.onnx of a loaded model", "53 s", "11 GB", "-"),
)


def measure(checkpoint: Path, out: Path, *, precision: str, dialect: str, weights: str) -> Measured:
    """Build in a fresh process while sampling its memory from outside."""
    command = [sys.executable, __file__, str(checkpoint), "--child", str(out)]
    command += ["--precision", precision, "--dialect", dialect, "--weights", weights]
    start, before = time.monotonic(), _cpu_seconds()
    child = subprocess.Popen(command)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    while child.poll() is None:
        for name, value in _memory(child.pid).items():
            peaks[name] = max(peaks[name], value)
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.monotonic() - start
    if child.returncode:
        raise SystemExit(f"the build failed with exit code {child.returncode}")
    inodes = {file.stat().st_ino for file in checkpoint.iterdir()}
    files = [file for file in out.rglob("*") if file.is_file() and file.stat().st_ino not in inodes]
    copied = [file for file in files if file.suffix == ".safetensors"]
    return Measured(
        seconds,
        _cpu_seconds() - before,
        peaks["VmHWM"],
        peaks["RssAnon"],
        sum(map(_size, files)),
        sum(map(_size, copied)),
    )


def _cpu_seconds() -> float:
    """Of ended child processes: what a busy machine does not change."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _size(file: Path) -> int:
    return file.stat().st_size


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it ended between poll and read
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon") if name in fields}


def _build(source: str, out: Path, precision: str, dialect: str, weights: str) -> None:
    from ep_export.bundle import Dialect, Precision
    from ep_export.checkpoint import open_checkpoint
    from ep_export.export import export_bundle
    from ep_export.numerics import DEFAULT_GROUP, WeightKind, Weights
    from ep_export.policy import Cut, Evidence, EvidenceKind, Keep, Schedule
    from ep_export.weights.packing import nearest

    out.mkdir()
    checkpoint = open_checkpoint(source)
    packing = None
    if weights != "none":
        kind = WeightKind(weights)
        group = DEFAULT_GROUP if kind is WeightKind.INT4 else None
        packing = nearest(checkpoint.tensors, Weights(kind, group, "nearest"), compute=precision)
    with _holes_not_hashed():
        export_bundle(
            checkpoint,
            out,
            schedule=Schedule((Cut(1),)),
            evidence=Evidence(EvidenceKind.TOLD, "a benchmark"),
            keep=Keep(ratio=0.25),
            dialect=Dialect(dialect),
            precision=Precision(precision),
            packing=packing,
        )


@contextmanager
def _holes_not_hashed() -> Iterator[None]:
    """Reading a hole makes the kernel fill pages with zeros: that alone would take longer than a build."""
    from ep_export.export.shards import Shards

    hash_file = Shards._hash  # there is no other place to leave it out

    def hash_unless_sparse(shards: Shards, file: Path) -> str:
        status = file.stat()
        sparse = status.st_blocks * 512 < status.st_size // 2
        return "0" * 64 if sparse else hash_file(shards, file)

    with mock.patch.object(Shards, "_hash", hash_unless_sparse):
        yield


def representatives() -> list[str]:
    """One alias a family: a 7B where it has one."""
    from ep_export.aliases import ALIASES

    chosen: dict[str, str] = {}
    for alias in ALIASES:
        first = alias.family not in chosen
        if alias.same_as is None and (first or not chosen[alias.family].endswith("-7b")):
            chosen[alias.family] = alias.name if first or alias.name.endswith("-7b") else chosen[alias.family]
    return list(chosen.values())


def _print(model: str, got: Measured, limits: Limits | None, check: str) -> bool:
    rows = [
        ("wall time", f"{got.seconds:.1f} s", limits and f"{limits.seconds:g} s"),
        ("CPU time", f"{got.cpu_seconds:.1f} s", None),
        ("peak RSS", f"{got.peak_rss / 1e9:.2f} GB", limits and f"{limits.peak_rss / 1e9:g} GB"),
        (
            "peak anonymous",
            f"{got.peak_anonymous / 1e9:.2f} GB",
            limits and f"{limits.peak_anonymous / 1e9:g} GB",
        ),
        ("bytes written", f"{got.written / 1e6:.1f} MB", limits and f"{limits.written / 1e6:g} MB"),
        ("of them weights", f"{got.copied / 1e6:.1f} MB", limits and f"{limits.copied / 1e6:g} MB"),
    ]
    print(f"{model:22}{'measured':>12}{'limit':>12}")
    for name, value, limit in rows:
        print(f"  {name:20}{value:>12}{limit or '-':>12}")
    held = _held(got, limits, check)
    print("  within the limits" if held else "  OVER A LIMIT", flush=True)
    return held


def _held(got: Measured, limits: Limits | None, check: str) -> bool:
    if limits is None:
        return True
    fields = [field for field in vars(limits) if check == "all" or field != "seconds"]
    return all(getattr(got, field) <= getattr(limits, field) for field in fields)


def _print_peers() -> None:
    print("\nmeasured earlier, elsewhere on the same kind of machine (qwen2.5-vl-7b, 4 layers):")
    for name, seconds, memory, written in PEERS:
        print(f"  {name:42}{seconds:>8}{memory:>18}{written:>9} written")


def bench(model: str, args: argparse.Namespace) -> Measured | None:
    """Write a checkpoint, build it, measure that and clear up; None where the disk is too small."""
    form = "sparse" if args.sparse else "synthetic"
    checkpoint = args.directory / f"{form}-{model}-{args.layers}-layers"
    bundle = args.directory / f"bundle-{model}-{args.layers}-layers"
    config = config_of(model, args.layers)
    whole = (checkpoint / "model.safetensors.index.json").is_file()
    need, free = checkpoint_bytes(config, checkpoint), free_bytes(checkpoint)
    if not whole and not args.sparse and need * 1.02 > free:
        print(
            f"{need / 1e9:.1f} GB needed in {args.directory}, {free / 1e9:.1f} GB free: try fewer --layers",
            file=sys.stderr,
        )
        return None
    print(f"{checkpoint.name}: {need / 1e9:.2f} GB, {'reused' if whole else 'writing'}", file=sys.stderr)
    shutil.rmtree(bundle, ignore_errors=True)
    try:
        write_synthetic(checkpoint, config, sparse=args.sparse)
        return measure(
            checkpoint, bundle, precision=args.precision, dialect=args.dialect, weights=args.weights
        )
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
        if not args.keep:
            shutil.rmtree(checkpoint, ignore_errors=True)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="qwen2.5-vl-7b", help="an alias, or families [%(default)s]")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--dialect", default="portable", choices=("portable", "modern"))
    parser.add_argument("--weights", default="none", choices=("none", "int8", "int4", "fp8"))
    parser.add_argument(
        "--sparse", action="store_true", help="zeros in sparse files, not hashed: no disk space, no time"
    )
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint for another run")
    parser.add_argument(
        "--check", default="all", choices=("all", "memory"), help="memory: print the time, do not judge it"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _build(str(args.directory), args.child, args.precision, args.dialect, args.weights)
        return 0
    held = True
    for model in representatives() if args.model == "families" else [args.model]:
        got = bench(model, args)
        if got is None:
            return 1
        if args.json:
            print(json.dumps({"model": model, **vars(got)}))
        held &= _print(model, got, LIMITS.get((args.weights, args.layers)), args.check)
    if args.model == "qwen2.5-vl-7b":
        _print_peers()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
