"""`ep-export targets`: what engines can be compiled for, and how far each target was verified."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import click

from ep_export.cli.console import print_json
from ep_export.cli.options import json_option
from ep_export.numerics import AS_THEY_ARE
from ep_export.policy import Scorer, TopK
from ep_export.targets import CHOOSERS, Flavour, Target, load_targets

__all__ = ["targets"]

_WIDTH = 80
_SOFTWARE = {
    Flavour.TENSORRT: "TensorRT",
    Flavour.TENSORRT_RTX: "TensorRT-RTX",
    Flavour.ONNXRUNTIME: "ONNX Runtime",
}


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the devices engines can be compiled for.

    Together are those with the same software: what graphs and policies it takes, and how far that was
    verified, stands above them.
    """
    known = load_targets()
    if as_json:
        print_json({"targets": [_entry(target) for target in known]})
        return
    groups: dict[tuple[object, ...], list[Target]] = {}
    for target in known:
        alike = (target.flavour, target.versions, target.cuda, target.graphs, target.weights, target.choosers)
        groups.setdefault((*alike, target.verified), []).append(target)
    for group in sorted(groups.values(), key=lambda group: (_SOFTWARE[group[0].flavour], group[0].name)):
        for line in _group_lines(group):
            click.echo(line)
        click.echo("")


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
        "weights": target.weights,
        "choosers": target.choosers,
        "scorers": [scorer for scorer in Scorer if target.takes_chooser(TopK(scorer))],
        "versions": target.versions,
        "cuda": target.cuda,
        "platform": target.platform,
        "memory_bytes": target.memory_bytes,
        "reserved_bytes": target.reserved_bytes,
        "bandwidth_bytes_per_second": target.bandwidth_bytes_per_second,
        "peak_flops": target.peak_flops,
        "sources": target.sources,
    }


def _group_lines(group: Sequence[Target]) -> list[str]:
    """What the targets of a group share, then a line each."""
    first = group[0]
    software = _SOFTWARE[first.flavour]
    software += f" {first.versions}, CUDA {first.cuda}" if first.versions else ""
    policies = "all" if first.choosers == CHOOSERS else ", ".join(first.choosers)
    if first.takes_plugins:
        policies += "; scores by the EntropyPrune plugin, or TensorRT's own operators"
    shared = (
        ("graphs", ", ".join(map(str, first.graphs))),
        ("weights", ", ".join("as they are" if kind == AS_THEY_ARE else kind for kind in first.weights)),
        ("policies", policies),
        ("verified", first.verified),
    )
    lines = [software]
    for name, text in shared:
        lines += textwrap.wrap(f"{name + ':':10}{text}", _WIDTH - 2, subsequent_indent=" " * 10)
    names = max(len(target.name) for target in group)
    devices = max(len(_device(target)) for target in group)
    lines += [
        f"  {target.name:{names}}  {_device(target):{devices}}  {_sm(target):7}  {_memory(target)}".rstrip()
        for target in group
    ]
    return lines


def _device(target: Target) -> str:
    """The product; what follows a comma is its software, which stands above."""
    return target.title.split(",")[0]


def _sm(target: Target) -> str:
    return f"SM {target.sm}" if target.sm else ""


def _memory(target: Target) -> str:
    return f"{target.memory_bytes / 1e9:.0f} GB" if target.memory_bytes else ""
