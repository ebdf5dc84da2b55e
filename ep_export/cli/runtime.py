"""Options that say what runs a bundle, and the backend they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ep_export.cli.options import add_options

if TYPE_CHECKING:
    from ep_export.bundle import Bundle
    from ep_export.runtime import RunnerFactory

__all__ = ["backend_sentence", "open_backend", "runtime_options"]

_F = TypeVar("_F", bound=Callable[..., Any])


def runtime_options(function: _F) -> _F:
    """`--runtime`, `--target`, `--provider`, `--threads`, `--exact`, `--verify`."""
    return add_options(
        function,
        click.option(
            "--runtime",
            type=click.Choice(["onnxruntime", "tensorrt"]),
            default="onnxruntime",
            show_default=True,
            help="tensorrt: engines made by `ep-export compile`, of TensorRT or TensorRT-RTX.",
        ),
        click.option("--target", metavar="T", help="With --runtime tensorrt: whose engines [the only ones]."),
        click.option(
            "--provider",
            "providers",
            multiple=True,
            metavar="P",
            help="Execution provider of ONNX Runtime: cpu, cuda, tensorrt, tensorrt-rtx, ...; may "
            "repeat, the best first. Nodes go to the CPU only where cpu is given [cpu].",
        ),
        click.option("--threads", type=click.IntRange(1), help="CPU threads [all]."),
        click.option(
            "--exact",
            is_flag=True,
            help="Multiply quantised weights by activations as they are, not rounded to 8 bits.",
        ),
        click.option(
            "--verify/--no-verify",
            default=True,
            show_default=True,
            help="Compute every checksum before use.",
        ),
    )


def open_backend(
    bundle: Bundle,
    *,
    runtime: str,
    target: str | None,
    providers: Sequence[str],
    threads: int | None,
    exact: bool,
    verify: bool,
) -> RunnerFactory:
    """What `runtime_options` collected.

    Raises:
        UserError: See `choose_backend`.
    """
    from ep_export.runtime.backends import Runtime, choose_backend

    return choose_backend(
        bundle,
        Runtime(runtime),
        target=target,
        providers=providers,
        threads=threads,
        exact=exact,
        verify=verify,
    )


def backend_sentence(backend: RunnerFactory) -> str:
    """Where the graphs' nodes went, when there was a choice; else empty."""
    from ep_export.runtime.backends import OnnxRuntimeBackend

    return backend.sentence if isinstance(backend, OnnxRuntimeBackend) else ""
