"""`ep-export inspect`: what a bundle is, what made it, what was verified."""

from __future__ import annotations

from pathlib import Path

import click

from ep_export.bundle import Bundle, Component, Manifest
from ep_export.cli.console import print_json, print_table
from ep_export.cli.options import bundle_argument, json_option
from ep_export.errors import UserError
from ep_export.numerics import RoundingCost

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
    _check_components(manifest)
    if as_json:
        print_json(manifest)
        return
    print_table(str(bundle), ("", ""), _facts(manifest, verified_files=verify))
    header = ("component", "role", "layers", "policy", "MB")
    print_table("components", header, [_row(manifest, component) for component in manifest.components])
    for component in manifest.components:
        print_table(component.file, ("", "tensor", "type", "shape"), _interface(component))


def _check_components(manifest: Manifest) -> None:
    """Sizes and checksums were compared file by file: a component that is none of them was not.

    Raises:
        UserError: A component names no file of the bundle.
    """
    known = {entry.path for entry in manifest.files}
    for component in manifest.components:
        if component.file not in known:
            raise UserError(
                f"component {component.name} names {component.file!r}, which is no file of the bundle",
                hint="build the bundle again, or copy it again whole",
            )


def _facts(manifest: Manifest, *, verified_files: bool) -> list[tuple[str, str]]:
    dims = manifest.dims
    heads = f"{dims.heads} query and {dims.kv_heads} key/value heads of {dims.head_dim}"
    total = sum(entry.bytes for entry in manifest.files)
    checked = "sizes and checksums match" if verified_files else "sizes match, checksums not computed"
    facts = [
        ("model", manifest.model + (f" @ {manifest.revision}" if manifest.revision else "")),
        ("family", manifest.family),
        ("decoder", f"{dims.layers} layers, {heads}, hidden {dims.hidden_size}"),
        *((f"cut {number}", str(cut)) for number, cut in enumerate(manifest.schedule.cuts)),
        ("policies", f"{', '.join(manifest.policies)} (`run --policy` picks one)"),
        ("evidence", f"{manifest.evidence.summary} [{manifest.evidence.kind.value}]"),
        ("keep", f"{manifest.keep} (average over layers; `run --keep` overrides it)"),
        ("graphs", f"{manifest.dialect.value}, opset {manifest.opset}, {manifest.precision.value}"),
        ("weights", _weights(manifest)),
        ("files", f"{len(manifest.files)}, {total / 1e6:.1f} MB; {checked}"),
        ("made by", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]
    facts += [(_COST_OF.get(cost.variant, cost.variant), _cost(cost)) for cost in manifest.rounding]
    facts += [(f"verified: {where}", sentence) for where, sentence in manifest.verified.items()]
    facts += [("warning", sentence) for sentence in manifest.warnings]
    return facts


def _row(manifest: Manifest, component: Component) -> tuple[str, str, str, str, str]:
    """What a component is: its role, where in the decoder, what it chooses by, how large its graph is."""
    layers = component.layer_range
    where = f"{layers.start} to {layers.stop - 1}" if len(layers) > 1 else "".join(map(str, layers))
    if component.cut is not None:
        where = f"before {manifest.schedule.cuts[component.cut].layer}"
    policy = component.chooser.name if component.chooser else ""
    size = next(entry.bytes for entry in manifest.files if entry.path == component.file)
    return component.name, component.role.value, where, policy, f"{size / 1e6:.2f}"


def _interface(component: Component) -> list[tuple[str, str, str, str]]:
    rows = []
    for arrow, specs in (("in", component.inputs), ("out", component.outputs)):
        rows += [
            (arrow, spec.name, spec.dtype, "[" + ", ".join(map(str, spec.shape)) + "]") for spec in specs
        ]
    return rows


_COST_OF = {
    "quantised": "rounding costs",
    "pruned": "pruning costs",
    "quantised and pruned": "both cost",
}


def _cost(cost: RoundingCost) -> str:
    """How far it is from the unquantised, unpruned model."""
    return f"KL {cost.kl:.1e}, same top token at {cost.agreement:.1%} of {cost.positions} positions"


def _weights(manifest: Manifest) -> str:
    """How shards came in, and what linear layers are stored in."""
    stored = manifest.numerics.weights if manifest.numerics else None
    if stored is None:
        return manifest.weights.value
    group = f", groups of {stored.group}" if stored.group else ""
    decoder = f"decoder in {stored.kind.value}{group}, rounded by {stored.rounding}"
    vision = [f"vision encoder in {stored.vision.value}"] if stored.vision else []
    return "; ".join([manifest.weights.value, decoder, *vision])
