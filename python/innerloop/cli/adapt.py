"""``innerloop adapt``: label a folder of images from a few labelled ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from innerloop.adaptation import Invert, Labelling, label_images, shown_name
from innerloop.atomic import write_atomically
from innerloop.cli.results import RunFolder
from innerloop.runs import load_run


def add_to(app: typer.Typer) -> None:
    app.command("adapt")(adapt_run)


def adapt_run(
    run: RunFolder,
    support: Annotated[
        Path,
        typer.Option(help="Folder with a folder of images for each class, named as the class.", show_default=False),
    ],
    query: Annotated[Path, typer.Option(help="Folder of the images to label.", show_default=False)],
    invert: Annotated[
        Invert,
        typer.Option(
            help="Exchange light and dark, as for ink on paper when the run was trained on light strokes; auto: "
            "grey images whose borders are light where the training data's are dark, or the other way round."
        ),
    ] = "auto",
    report: Annotated[
        Path | None, typer.Option(help="Write a page with every image and its label: one HTML file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Label the images of a folder from a few labelled ones, with a run's best checkpoint.

    A gradient method (maml, anil) takes as many classes as it was trained with, an embedding method (protonet,
    matching_net) any number. Images are made grey or RGB and stretched to the size that the run was trained on.
    """
    config, dataset, algorithm = load_run(run)
    ways = config.training.ways if algorithm.needs_head else None
    labelling = label_images(algorithm, dataset, support, query, ways=ways, invert=invert)
    if report is not None:
        from innerloop.report import labelling_page

        title = f"{config.algorithm.name} trained on {config.data.name}"
        write_atomically(report, labelling_page(labelling, title).encode(errors="replace"))
    if as_json:
        typer.echo(json.dumps(_record(run, labelling)))
    else:
        _print(labelling, report)


def _record(run: Path, labelling: Labelling) -> dict[str, object]:
    return {
        "run": str(run),
        "inverted": labelling.inverted,
        "classes": {name: len(files) for name, files in labelling.support.items()},
        "images": [
            {
                "file": str(image.path),
                "label": image.label,
                "confidence": image.confidence,
                "second": image.second,
                "second_confidence": image.second_confidence,
            }
            for image in labelling.images
        ],
    }


def _print(labelling: Labelling, report: Path | None) -> None:
    console = Console(highlight=False)
    table = Table("file", "label", "confidence", "second choice", box=None, pad_edge=False)
    for image in labelling.images:
        table.add_row(
            escape(shown_name(image.path)),
            escape(image.label),
            f"{100 * image.confidence:.1f} %",
            f"{escape(image.second)} ({100 * image.second_confidence:.1f} %)",
        )
    console.print(table)
    if labelling.inverted:
        console.print("Light and dark were exchanged to match the training data (--invert no leaves them).")
    if report is not None:
        console.print(f"Report: {escape(str(report))}", soft_wrap=True)
