"""`ep-export package`: a bundle as another server wants it."""

from __future__ import annotations

from pathlib import Path

import click

from ep_export.cli.console import note, print_json
from ep_export.cli.options import bundle_argument, json_option

__all__ = ["package"]


@click.command()
@bundle_argument
@click.option(
    "--triton",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Write a Triton Inference Server model repository here.",
)
@click.option("--target", metavar="T", help="Serve the engines compiled for it [the ONNX files].")
@click.option("--gpu", is_flag=True, help="Let ONNX Runtime use the server's GPU.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@json_option
def package(
    bundle: Path, triton: Path, target: str | None, gpu: bool, overwrite: bool, as_json: bool
) -> None:
    """Package a bundle for a Triton Inference Server."""
    from ep_export.bundle import Bundle
    from ep_export.documents import encode
    from ep_export.package import write_repository
    from ep_export.targets import find_target

    chosen = find_target(target) if target else None
    repository = write_repository(Bundle.open(bundle), triton, target=chosen, gpu=gpu, overwrite=overwrite)
    if as_json:
        print_json({**encode(repository), "path": str(repository.path)})
        return
    click.echo(str(repository.path))
    engines = f", engines for {repository.target}" if repository.target else ""
    weights = "linked, not copied" if repository.linked else "copied: no hard links here"
    note(f"one model, run by {repository.runtime}{engines}, that batches; weights {weights}")
    note(f"how to serve it: {repository.path / 'README.md'} (not run here: no Triton server)")
