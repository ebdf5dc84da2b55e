"""`ep-export targets`: what engines can be compiled for, and how far each target was verified."""

from __future__ import annotations

import click

from ep_export.cli.console import print_json, print_table
from ep_export.cli.options import json_option
from ep_export.targets import Flavour, Target, load_targets

__all__ = ["targets"]


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the devices engines can be compiled for."""
    known = load_targets()
    if as_json:
        print_json({"targets": [_entry(target) for target in known]})
        return
    header = ("target", "device", "SM", "runs with", "memory", "dialect", "dtypes", "verified")
    print_table("", header, [_row(target) for target in known])
    for sentence, names in _by_sentence(known).items():
        click.echo(f"{sentence} [{', '.join(names)}]")


def _entry(target: Target) -> dict[str, object]:
    """The fields that scripts rely on, then the rest."""
    return {
        "name": target.name,
        "sm": target.sm,
        "flavour": target.flavour,
        "dtypes": target.dtypes,
        "dialect": target.dialects[0],
        "verified": target.verified,
        "title": target.title,
        "graphs": target.graphs,
        "scorers": target.scorers,
        "versions": target.versions,
        "cuda": target.cuda,
        "platform": target.platform,
        "memory_bytes": target.memory_bytes,
        "reserved_bytes": target.reserved_bytes,
        "bandwidth_bytes_per_second": target.bandwidth_bytes_per_second,
        "peak_flops": target.peak_flops,
        "sources": target.sources,
    }


def _row(target: Target) -> tuple[str, ...]:
    memory = "-" if target.memory_bytes is None else f"{target.memory_bytes / 1e9:.0f} GB"
    names = {
        Flavour.TENSORRT: "TensorRT",
        Flavour.TENSORRT_RTX: "TensorRT-RTX",
        Flavour.ONNXRUNTIME: "ONNX Runtime",
    }
    software = names[target.flavour] + (f" {target.versions}" if target.versions else "")
    dtypes, dialects = (" ".join(each.value for each in kind) for kind in (target.dtypes, target.dialects))
    verified = target.verified.split(":")[0]
    return target.name, target.title, target.sm or "-", software, memory, dialects, dtypes, verified


def _by_sentence(known: tuple[Target, ...]) -> dict[str, list[str]]:
    """Targets that were verified alike, together."""
    alike: dict[str, list[str]] = {}
    for target in known:
        alike.setdefault(target.verified, []).append(target.name)
    return alike
