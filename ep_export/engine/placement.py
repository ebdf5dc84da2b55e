"""Where every component of a bundle runs on a target: the one place that sets policies against compilers.

A manifest, a target and what was asked for enter; the components that become engines leave, and those that
stay with ONNX Runtime on the CPU. Which policies a compiler takes is data of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ep_export.bundle import Component, Manifest, Role
from ep_export.errors import UsageError, UserError
from ep_export.policy import Chooser, Random, TopK
from ep_export.targets import Target

__all__ = ["TOP_K_LIMIT", "Placement", "PruneOn", "check_chooser", "place_components", "takes_plugin"]

TOP_K_LIMIT = 3840
"""The operator TopK takes a k below this in TensorRT. The plugin has no such limit."""

_SORTING = (TopK, Random)
"""Choosers whose standard operators end in TopK."""


class PruneOn(str, Enum):
    """What runs prune components."""

    TARGET = "target"  # engines, as everything else
    CPU = "cpu"  # ONNX Runtime, beside the engines


@dataclass(frozen=True)
class Placement:
    """Components of a bundle that are used on a target.

    Attributes:
        engines: Become engines, in the manifest's order; an embedding table read on the host is none.
        on_cpu: Prune components that ONNX Runtime runs on the CPU.
    """

    engines: tuple[Component, ...]
    on_cpu: tuple[Component, ...]


def place_components(
    manifest: Manifest,
    target: Target,
    *,
    policies: Sequence[str] = (),
    prune_on: PruneOn = PruneOn.TARGET,
    plugin: bool = False,
    max_kept_tokens: int,
) -> Placement:
    """Say which components become engines: all but what no backend opens or nobody asked for.

    An embedding table is read on the host; policies that are not used need no engines.

    Args:
        manifest: The bundle's.
        target: What engines are for; not ONNX Runtime.
        policies: To have ready besides those of the bundle's schedule.
        prune_on: What runs prune components.
        plugin: Whether the plugin takes the place of the node that scores and chooses.
        max_kept_tokens: Most visual tokens that go on at a cut.

    Raises:
        UserError: A policy that the bundle has not, or that the target's compiler does not take.
        UsageError: More kept tokens than the compiler's TopK takes.
    """
    prunes = _prunes(manifest, policies)
    if prune_on is PruneOn.CPU:
        prunes_on_target: tuple[Component, ...] = ()
    else:
        prunes_on_target = prunes
        for prune in prunes:
            if prune.chooser is not None:
                check_chooser(prune.chooser, target, plugin=plugin, max_kept_tokens=max_kept_tokens)
    engines = tuple(
        component
        for component in manifest.components
        if component.table is None and (component.role is not Role.PRUNE or component in prunes_on_target)
    )
    return Placement(engines, tuple(prune for prune in prunes if prune not in prunes_on_target))


def check_chooser(
    chooser: Chooser, target: Target, *, plugin: bool = False, max_kept_tokens: int | None = None
) -> None:
    """Refuse what a target's compiler does not take.

    Args:
        chooser: Of a cut.
        target: What engines are for.
        plugin: Whether the plugin takes the place of the node that scores and chooses.
        max_kept_tokens: Most visual tokens that go on; None where that is not known yet.

    Raises:
        UserError: Says which policies it takes.
        UsageError: More kept tokens than the compiler's TopK takes.
    """
    if plugin and isinstance(chooser, TopK):
        return
    if not target.takes_chooser(chooser):
        raise UserError(
            f"{target.flavour.value} cannot compile policy {chooser.name} for {target.name}, "
            f"expected one of: {', '.join(target.choosers)}",
            hint="choose another policy, or let ONNX Runtime prune on the CPU beside the engines: "
            "compile --prune-on cpu",
        )
    if max_kept_tokens is not None and max_kept_tokens >= TOP_K_LIMIT and isinstance(chooser, _SORTING):
        raise UsageError(
            f"engines for {target.name} would keep up to {max_kept_tokens} visual tokens, expected "
            f"fewer than {TOP_K_LIMIT}, the limit of TopK in {target.flavour.value}",
            hint=f"give --max-kept-tokens {TOP_K_LIMIT - 1}, or a --max-prompt below {TOP_K_LIMIT}",
        )


def takes_plugin(component: Component) -> bool:
    """Whether a component holds the node that the plugin can take the place of."""
    return isinstance(component.chooser, TopK)


def _prunes(manifest: Manifest, policies: Sequence[str]) -> tuple[Component, ...]:
    """Prune components of the bundle's schedule and of further policies, in the manifest's order."""
    used = {manifest.prune(i, cut.chooser.name).name for i, cut in enumerate(manifest.schedule.cuts)}
    prunes = manifest.with_role(Role.PRUNE)
    for policy in policies:
        named = {prune.name for prune in prunes if prune.chooser and prune.chooser.name == policy}
        used |= named or {manifest.prune(0, policy).name}  # which says that there is none
    return tuple(prune for prune in prunes if prune.name in used)
