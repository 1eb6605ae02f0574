"""``innerloop algorithms | datasets | info``: what is installed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from innerloop import _library, _native
from innerloop.registry import Registry, algorithms, datasets

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    app.command("algorithms")(list_algorithms)
    app.command("datasets")(list_datasets)
    app.command("info")(info)


def list_algorithms(as_json: AsJson = False) -> None:
    """List the algorithms: the built-in ones and those of installed plug-ins."""
    _list(algorithms, as_json)


def list_datasets(as_json: AsJson = False) -> None:
    """List the data sets: the built-in ones and those of installed plug-ins."""
    _list(datasets, as_json)


def _list(registry: Registry[Any], as_json: bool) -> None:
    rows = [
        {
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "summary": summary,
            "state": state,
        }
        for plugin, summary, state in registry.listing()
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("name", "distribution", "version", "what it is", "state", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row.values()))
    Console(highlight=False).print(table)


def info(as_json: AsJson = False) -> None:
    """Show versions, the native libraries and what this machine offers them."""
    build = _native.build_info()
    requirement = next(
        (line for line in importlib.metadata.requires("innerloop") or [] if line.startswith("torch")), "torch"
    )
    cuda_built = _library.CUDA_LIBRARY is not None
    facts = {
        "innerloop": importlib.metadata.version("innerloop"),
        "torch": f"{torch.__version__} (built against {build['torch']}, supported: {requirement})",
        "python": platform.python_version(),
        "compiler": build["compiler"],
        "CPU library": str(_library.CPU_LIBRARY),
        "CPU instruction set": torch.ops.innerloop.instruction_set(),
        "CUDA library": str(_library.CUDA_LIBRARY) if cuda_built else "not built",
        "CUDA built": f"nvcc {build['cuda_compiler']}, sm {build['cuda_architectures']}" if cuda_built else "no",
        "CUDA usable": _cuda_state(),
        "threads": str(torch.get_num_threads()),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():  # no table: a path must stay whole, to be copied
        typer.echo(f"{name:{width}}  {value}")


def _cuda_state() -> str:
    if not _library.cuda_loaded:
        return "no: torch is a CPU build" if torch.version.cuda is None else "no: the CUDA library was not built"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no: torch finds no CUDA device"
