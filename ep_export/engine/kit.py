"""The kit: a directory that two commands on a device turn into engines and compare with PyTorch.

TensorRT builds engines only on the GPU they serve. So a bundle and a target enter here, and what leaves is
the bundle itself (by hard links where possible), the plugin's sources, the profiles as options of `trtexec`,
scripts, golden files and checksums. Nothing in it refers to anything outside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ep_export
from ep_export.bundle import Bundle, Component, FileEntry, Precision, write_manifest
from ep_export.data import data_dir
from ep_export.documents import encode
from ep_export.engine.kit_files import (
    SUMS,
    GoldenCase,
    Needs,
    needs_of,
    trtexec_arguments,
    write_checksums,
    write_settings,
)
from ep_export.engine.kit_readme import POLYGRAPHY_VERSION, readme
from ep_export.engine.placement import TOP_K_LIMIT, Placement, takes_plugin
from ep_export.engine.sources import has_open_capacity, write_settled, write_stripped
from ep_export.engine_record import (
    ENGINES,
    EngineFile,
    EngineRecord,
    Limits,
    PluginFile,
    Profile,
    source_sha256,
)
from ep_export.errors import UsageError, UserError
from ep_export.links import link_or_copy
from ep_export.plugin.build import LIBRARY
from ep_export.progress import Progress, silent
from ep_export.targets import Flavour, Target

__all__ = ["KIT", "Kit", "write_kit"]

KIT = "kit.json"
FORMAT = 2
_STAGE = "kit"
_SCRIPTS = ("build.sh", "verify.sh")
_HELPERS = ("check_choice.py", "load_inputs.py", "polygraphy_run.py", "write_record.py")
_MADE_THERE = ("logs", "build", "kit", "golden", "plugins")  # names a bundle's files must not take
_MIB = 1 << 20


@dataclass(frozen=True)
class Kit:
    """What `kit.json` says.

    Attributes:
        target: Name of the target.
        title: The device.
        sm: Its compute capability.
        tensorrt: Versions it is for, in words.
        model: As in the manifest.
        precision: Of the graphs.
        limits: What engines are compiled for.
        profiles: Component name -> profiles, in the order of the engine's indices; of what becomes an engine.
        on_cpu: Prune components that ONNX Runtime runs on the device's CPU.
        golden: Cases that verify.sh compares; empty when the kit was made without.
        linked: Whether all weights are hard links to the bundle's.
        made_by: Package name -> version.
        format: Version of this structure.
    """

    target: str
    title: str
    sm: str
    tensorrt: str
    model: str
    precision: Precision
    limits: Limits
    profiles: Mapping[str, tuple[Profile, ...]]
    on_cpu: tuple[str, ...]
    golden: tuple[GoldenCase, ...]
    linked: bool
    made_by: Mapping[str, str]
    format: int = FORMAT


@dataclass(frozen=True)
class _Plan:
    """What a kit is made of."""

    bundle: Bundle
    target: Target
    limits: Limits
    profiles: Mapping[str, tuple[Profile, ...]]
    placement: Placement

    @property
    def components(self) -> tuple[Component, ...]:
        """What becomes an engine on the device."""
        return self.placement.engines

    @property
    def with_plugin(self) -> tuple[str, ...]:
        """Those whose node the plugin takes the place of."""
        return tuple(component.name for component in self.components if takes_plugin(component))


def write_kit(
    bundle: Bundle,
    target: Target,
    limits: Limits,
    profiles: Mapping[str, tuple[Profile, ...]],
    out: Path,
    progress: Progress = silent,
    *,
    placement: Placement,
    model: str | None = None,
    golden: bool = True,
) -> Path:
    """Write a kit.

    Args:
        bundle: An opened bundle.
        target: A TensorRT target.
        limits: What its engines are to be able to do.
        profiles: From `make_profiles`.
        out: An existing empty directory (see `ep_export.staging.staged`).
        progress: Told about stages.
        placement: Which components become engines.
        model: Checkpoint that the golden outputs come from; the one the bundle names when None.
        golden: Compute golden files; it loads the model in float32.

    Returns:
        `out`.

    Raises:
        UsageError: The target is no TensorRT target or does not take such graphs.
        UserError: The checkpoint is missing or another one, limits too small for the test card, or no space.
    """
    _refuse(bundle, target)
    plan = _Plan(bundle, target, limits, profiles, placement)
    steps = 3
    progress(_STAGE, 0, steps)
    linked = _link_bundle(bundle, out)
    if target.strips_body:
        for name in plan.with_plugin:
            write_stripped(bundle.file(bundle.manifest.component(name).file), out / f"{name}.plugin.onnx")
    for component in filter(has_open_capacity, plan.components):
        settled = out / f"{component.name}.settled.onnx"
        rows = limits.at(component, bundle.manifest.schedule).capacity
        write_settled(bundle.file(component.file), settled, rows)
    plugins = data_dir("plugins")
    shutil.copytree(plugins, out / "plugins", ignore=shutil.ignore_patterns("__pycache__", "build", ".*"))
    progress(_STAGE, 1, steps)
    _write_scripts(plan, out, needs_of(bundle, plan.components))
    progress(_STAGE, 2, steps)
    cases = _write_golden(plan, out, progress, model) if golden else ()
    kit = Kit(
        target=target.name,
        title=target.title,
        sm=target.sm or "",
        tensorrt=str(target.versions),
        model=bundle.manifest.model_name,
        precision=bundle.manifest.precision,
        limits=limits,
        profiles={component.name: profiles[component.name] for component in plan.components},
        on_cpu=tuple(component.name for component in placement.on_cpu),
        golden=cases,
        linked=linked,
        made_by={"ep-export": ep_export.__version__},
    )
    (out / KIT).write_text(json.dumps(encode(kit), indent=2) + "\n", encoding="utf-8")
    known = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    write_checksums(out, known)
    progress(_STAGE, steps, steps)
    return out


def _refuse(bundle: Bundle, target: Target) -> None:
    manifest = bundle.manifest
    if target.flavour is not Flavour.TENSORRT:
        raise UsageError(
            f"a kit is for TensorRT, and {target.name} is a {target.flavour.value} target",
            hint="see `ep-export targets`",
        )
    if not target.takes(manifest.dialect, manifest.precision):
        graphs = f"{manifest.dialect.value} {manifest.precision.value}"
        takes = ", ".join(map(str, target.graphs))
        raise UsageError(
            f"{target.name} takes no {graphs} graphs, which this bundle has; it takes {takes}",
            hint=f"export again with --dialect {target.graphs[0].dialect.value} "
            f"--precision {target.graphs[0].precision.value}",
        )
    for path in (entry.path for entry in _own_files(bundle)):
        if path.split("/")[0] in _MADE_THERE or path in (*_SCRIPTS, KIT, SUMS):
            raise UserError(
                f"bundle file {path} has a name that the kit needs", hint="build the bundle again"
            )


def _link_bundle(bundle: Bundle, out: Path) -> bool:
    """The bundle's own files, and a manifest of them; engines and kits for other targets stay behind."""
    files = _own_files(bundle)
    linked = [link_or_copy(bundle.file(entry.path), out / entry.path) for entry in files]
    write_manifest(out, replace(bundle.manifest, files=files))
    return all(linked)


def _own_files(bundle: Bundle) -> tuple[FileEntry, ...]:
    return tuple(entry for entry in bundle.manifest.files if not entry.path.startswith(f"{ENGINES}/"))


def _write_scripts(plan: _Plan, out: Path, needs: Needs) -> None:
    templates = data_dir("engines") / "kit"
    (out / "kit").mkdir()
    for name in _SCRIPTS:
        shutil.copy(templates / name, out / name)
        (out / name).chmod(0o755)  # a wheel does not keep the bit
    for name in _HELPERS:
        shutil.copyfile(templates / name, out / "kit" / name)
    for component in plan.components:
        arguments = trtexec_arguments(component, plan.profiles[component.name])
        (out / "kit" / f"{component.name}.args").write_text("\n".join(arguments) + "\n", encoding="utf-8")
    write_settings(out / "kit" / "settings.sh", _settings(plan, needs))
    record = json.dumps(encode(_record(plan)), indent=2)
    (out / "kit" / "record.json").write_text(record + "\n", encoding="utf-8")
    text = readme(
        templates / "README.md",
        plan.bundle,
        plan.target,
        plan.limits,
        needs,
        with_plugin=plan.with_plugin,
        on_cpu=tuple(component.name for component in plan.placement.on_cpu),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _settings(plan: _Plan, needs: Needs) -> Mapping[str, str | int | bool]:
    target = plan.target
    assert target.versions is not None and target.platform is not None and target.sm is not None  # noqa: PT018, S101
    return {
        "TARGET": target.name,
        "TITLE": target.title,
        "SM": target.sm,
        "PLATFORM": target.platform.value,
        "TENSORRT": str(target.versions),
        "TENSORRT_MIN": target.versions.minimum,
        "TENSORRT_MAX": target.versions.maximum,
        "PRECISION": plan.bundle.manifest.precision.value,
        "COMPONENT_NAMES": " ".join(component.name for component in plan.components),
        "PLUGIN_COMPONENTS": " ".join(plan.with_plugin),
        "STRIPPED": target.strips_body,
        "BODY_FITS": plan.limits.max_kept_tokens < TOP_K_LIMIT,
        "NEED_MEMORY_MIB": -(-needs.memory_bytes // _MIB),
        "NEED_DISK_MIB": -(-needs.disk_bytes // _MIB),
        "POLYGRAPHY_VERSION": POLYGRAPHY_VERSION,
    }


def _record(plan: _Plan) -> EngineRecord:
    """What engine.json will say but for what only the device knows: see kit/write_record.py."""
    manifest, target = plan.bundle.manifest, plan.target
    return EngineRecord(
        target=target.name,
        sm=target.sm or "",
        flavour=target.flavour,
        version="",
        cuda=target.cuda or "",
        model=manifest.model_name,
        dialect=manifest.dialect,
        precision=manifest.precision,
        limits=plan.limits,
        components={
            component.name: EngineFile(
                role=component.role,
                file=f"{component.name}.engine",
                sha256="",
                bytes=0,
                build_seconds=0.0,
                profiles=plan.profiles[component.name],
                source=source_sha256(manifest, component),
                plugin=takes_plugin(component),
            )
            for component in plan.components
        },
        on_cpu=tuple(component.name for component in plan.placement.on_cpu),
        plugin=PluginFile(LIBRARY, "", 0) if plan.with_plugin else None,
        made_by={"ep-export": ep_export.__version__},
    )


def _write_golden(plan: _Plan, out: Path, progress: Progress, model: str | None) -> tuple[GoldenCase, ...]:
    from ep_export.checkpoint import open_origin
    from ep_export.engine.kit_golden import write_golden

    try:
        checkpoint = open_origin(plan.bundle, model)
    except UserError as error:
        raise UserError(
            f"the golden outputs of a kit come from the checkpoint: {error}",
            hint="give the checkpoint with --model, or make a kit without golden files: --no-golden",
        ) from error
    return write_golden(plan.bundle, checkpoint, plan.limits, plan.profiles, plan.components, out, progress)
