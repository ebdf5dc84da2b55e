"""`ep-export validate`: does the bundle answer as PyTorch does? Exit 3 when it does not."""

from __future__ import annotations

from pathlib import Path

import click

from ep_export.cli.build import EXIT_DIFFERENT
from ep_export.cli.console import note, print_json, progress_bar
from ep_export.cli.options import bundle_argument, json_option

__all__ = ["validate"]


@click.command()
@bundle_argument
@click.option(
    "--model", metavar="M", help="The checkpoint to compare with [the one the bundle was built from]."
)
@click.option(
    "--images", type=click.Path(path_type=Path), metavar="DIR", help="Folder of pictures [test cards]."
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="JSON: picture name -> questions."
)
@click.option(
    "--max-pictures", type=click.IntRange(1), default=8, show_default=True, help="Pictures compared."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="DIR", help="Write the report here [BUNDLE/report]."
)
@json_option
def validate(
    bundle: Path,
    model: str | None,
    images: Path | None,
    prompts: Path | None,
    max_pictures: int,
    max_new_tokens: int,
    report: Path | None,
    as_json: bool,
) -> int:
    """Compare a bundle with the pruned PyTorch model."""
    from ep_export.build import validate_bundle
    from ep_export.bundle import Bundle
    from ep_export.checkpoint import open_checkpoint
    from ep_export.validate import text_lines, to_json

    opened = Bundle.open(bundle)
    checkpoint = open_checkpoint(model or opened.manifest.model)
    with progress_bar() as progress:
        found = validate_bundle(
            opened,
            checkpoint,
            images=images,
            prompts=prompts,
            max_pictures=max_pictures,
            max_new_tokens=max_new_tokens,
            out=report,
            progress=progress,
        )
    if as_json:
        print_json(to_json(found))
    else:
        for line in text_lines(found):
            click.echo(line)
    note(f"report: {(report or bundle / 'report') / 'report.html'}")
    return EXIT_DIFFERENT if found.verdict.value == "FAIL" else 0
