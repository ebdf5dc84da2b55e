"""What is checked before a compiler is started: graphs, memory of the device, and this machine.

Every refusal here is a sentence of ours; what a compiler says about the same mistake is a page.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from ep_export.bundle import Bundle, Manifest
from ep_export.checkpoint import open_config
from ep_export.engine.profiles import max_visual_tokens
from ep_export.engine_record import Limits
from ep_export.errors import UserError
from ep_export.first_token import tokens_work
from ep_export.fit import Estimate, estimate
from ep_export.numerics import WeightKind, Weights
from ep_export.planning import kept_tokens, make_plan
from ep_export.policy import Keep, Nothing, Schedule
from ep_export.targets import Flavour, Graphs, Target

__all__ = [
    "check_fit",
    "check_graphs",
    "check_machine",
    "check_stored",
    "check_weights",
    "estimate_limits",
    "free_memory",
]

# Peak memory of TensorRT-RTX 1.7 over the size of an engine, rounded up: 2.9 measured on one of 1.9 GB.
_COMPILER_MEMORY = 4
_TENSORRT_GROUPS = (64, 128)  # of INT4, by TensorRT 10.3's documentation; TensorRT-RTX took 32 as well here
_MEMINFO = Path("/proc/meminfo")


def check_graphs(bundle: Bundle, target: Target) -> None:
    """Refuse dialects and precisions the target has no kernels for.

    Raises:
        UserError: Says which it takes.
    """
    found, best = _graphs(bundle.manifest), target.graphs[0]
    if found not in target.graphs:
        takes = ", ".join(map(str, target.graphs))
        raise UserError(
            f"{bundle.path} has {found} graphs, expected for {target.name} one of: {takes}",
            hint=f"build it again with --dialect {best.dialect.value} --precision {best.precision.value}, "
            f"or with --target {target.name}, which chooses them",
        )


def check_weights(bundle: Bundle, target: Target) -> None:
    """Refuse weights that the target cannot multiply.

    Raises:
        UserError: See `check_stored`.
    """
    numerics = bundle.manifest.numerics
    check_stored(numerics.weights if numerics else None, target, str(bundle.path))


def check_stored(weights: Weights | None, target: Target, subject: str) -> None:
    """Refuse weights that the target cannot multiply, also before there is a bundle.

    Args:
        weights: What linear layers are stored in.
        target: Where they shall run.
        subject: What stores them, for the message.

    Raises:
        UserError: A type the target has no products for, or blocks that its compiler does not take.
    """
    if weights is None:
        return
    kind = weights.kind.value
    if not target.takes_weights(weights):
        sm = f" (SM {target.sm})" if target.sm else ""
        raise UserError(
            f"{subject} stores weights in {kind}, which {target.name}{sm} cannot multiply, "
            f"expected one of: {', '.join(target.weights)}",
            hint=f"build it with --weights {target.weights[0]}",
        )
    blocks = target.flavour is Flavour.TENSORRT and weights.kind is WeightKind.INT4
    if blocks and weights.group not in _TENSORRT_GROUPS:
        had = f"groups of {weights.group}" if weights.group else "one scale a column"
        raise UserError(
            f"{subject} stores weights in int4 with {had}, expected for {target.name} groups of 64 or 128",
            hint="build it with --group 128",
        )


def estimate_limits(bundle: Bundle, target: Target, limits: Limits) -> Estimate | None:
    """Memory at the limits: the longest prompt, of which as much goes on as the engines must be able to."""
    manifest = bundle.manifest
    visual = max_visual_tokens(bundle, limits)
    every = _as_much_as_passes(manifest.schedule, manifest.dims.layers)
    passing = kept_tokens(every, manifest.schedule, layers=manifest.dims.layers, visual_tokens=visual)
    plan = make_plan(
        manifest.dims,
        manifest.schedule,
        every,
        visual_tokens=visual,
        text_tokens=limits.max_prompt - visual,
        vision=tokens_work(open_config(str(bundle.file("processor"))), visual),
        kept=tuple(min(limits.max_kept_tokens, kept) for kept in passing),
    )
    return estimate(
        plan,
        target,
        new_tokens=limits.max_new_tokens,
        graphs=_graphs(manifest),
        weights=manifest.numerics.weights if manifest.numerics else None,
    )


def check_fit(target: Target, prompt_tokens: int, guessed: Estimate | None, *, pruned: bool) -> None:
    """Refuse what cannot fit on the device with a prompt of that length, pruned or not.

    Raises:
        UserError: Says how much is needed, for what, and how much there is.
    """
    if guessed is None:
        return
    figures = guessed.pruned if pruned else guessed.full
    if guessed.fits(figures):
        return
    parts = f"weights {_gb(guessed.weight_bytes)}, caches {_gb(figures.kv_bytes)}, "
    parts += f"activations {_gb(figures.activation_bytes)}"
    raise UserError(
        f"prompts of {prompt_tokens} tokens need about {_gb(figures.total_bytes)} on {target.name} "
        f"({parts}; an estimate), expected at most {_gb(guessed.available_bytes)}",
        hint="lower --max-prompt, --max-pixels or --max-kept-tokens, take a smaller model, or go on with "
        "--force",
    )


def check_machine(bundle: Bundle, guessed: Estimate | None, out: Path) -> None:
    """Disk and memory of this machine, before time is spent.

    Raises:
        UserError: Too little of one for the engines.
    """
    if guessed is None:
        return
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if guessed.weight_bytes > free:
        raise UserError(
            f"the engines need about {_gb(guessed.weight_bytes)} on disk, {parent} has {_gb(free)} free",
            hint="give an --out on another disk",
        )
    longest = max(bundle.manifest.spans, key=lambda span: len(span.layer_range))
    share = len(longest.layer_range) / bundle.manifest.dims.layers
    needed, memory = int(_COMPILER_MEMORY * guessed.weight_bytes * share), free_memory()
    if memory is not None and needed > memory:
        raise UserError(
            f"compiling {longest.name} needs about {_gb(needed)} of memory, {_gb(memory)} are free here",
            hint="compile on a machine with more memory, or go on with --force",
        )


def _as_much_as_passes(schedule: Schedule, layers: int) -> Keep:
    """All tokens, but where a cut drops every one of them."""
    ends = (cut.layer for cut in schedule.cuts if isinstance(cut.chooser, Nothing))
    return Keep(ratio=next(ends, layers) / layers)


def _graphs(manifest: Manifest) -> Graphs:
    return Graphs(manifest.dialect, manifest.precision)


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
