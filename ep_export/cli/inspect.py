"""`ep-export inspect`: what a bundle is, what made it, what was verified."""

from __future__ import annotations

from pathlib import Path

import click

from ep_export.bundle import Bundle, Component, Manifest
from ep_export.cli.console import print_json, print_table
from ep_export.cli.options import bundle_argument, json_option

__all__ = ["inspect"]


@click.command()
@bundle_argument
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compute every checksum, not only sizes."
)
@json_option
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Check a bundle's files and print its manifest."""
    manifest = Bundle.open(bundle, verify=verify).manifest
    if as_json:
        print_json(manifest)
        return
    print_table(str(bundle), ("", ""), _facts(manifest, verified_files=verify))
    for component in manifest.components:
        print_table(component.file, ("", "tensor", "type", "shape"), _interface(component))


def _facts(manifest: Manifest, *, verified_files: bool) -> list[tuple[str, str]]:
    dims, layer = manifest.dims, manifest.policy.layer
    heads = f"{dims.heads} query and {dims.kv_heads} key/value heads of {dims.head_dim}"
    total = sum(entry.bytes for entry in manifest.files)
    checked = "sizes and checksums match" if verified_files else "sizes match, checksums not computed"
    facts = [
        ("model", manifest.model + (f" @ {manifest.revision}" if manifest.revision else "")),
        ("family", manifest.family),
        ("decoder", f"{dims.layers} layers, {heads}, hidden {dims.hidden_size}"),
        ("split", f"head: layers 0..{layer - 1}, tail: layers {layer}..{dims.layers - 1}"),
        ("policy", str(manifest.policy)),
        ("evidence", f"{manifest.evidence.summary} [{manifest.evidence.kind.value}]"),
        ("keep", f"{manifest.keep} (average over layers; `run --keep` overrides it)"),
        ("graphs", f"{manifest.dialect.value}, opset {manifest.opset}, {manifest.precision.value}"),
        ("weights", manifest.weights.value),
        ("files", f"{len(manifest.files)}, {total / 1e6:.1f} MB; {checked}"),
        ("made by", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]
    facts += [(f"verified: {where}", sentence) for where, sentence in manifest.verified.items()]
    facts += [("warning", sentence) for sentence in manifest.warnings]
    return facts


def _interface(component: Component) -> list[tuple[str, str, str, str]]:
    rows = []
    for arrow, specs in (("in", component.inputs), ("out", component.outputs)):
        rows += [
            (arrow, spec.name, spec.dtype, "[" + ", ".join(map(str, spec.shape)) + "]") for spec in specs
        ]
    return rows
