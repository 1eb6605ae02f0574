"""The command line: ``innerloop train | evaluate | adapt | explain | bench | algorithms | datasets |
info``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from innerloop.checkpoint import CheckpointError
from innerloop.cli import adapt, bench, engines, inspection, results, train
from innerloop.options import OptionError
from innerloop.registry import PluginError, UnknownNameError
from innerloop.training import NonFiniteLossError

app = typer.Typer(
    name="innerloop",
    help="Meta-learning and few-shot learning with PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train.add_to(app)
results.add_to(app)
adapt.add_to(app)
inspection.add_to(app)
engines.add_to(app)
bench.add_to(app)

# What a user can mend, not a fault of the program: a sentence, no traceback. (Set INNERLOOP_DEBUG=1 to see it.)
_USAGE = (UnknownNameError, OptionError, LookupError)
_FAILURE = (PluginError, CheckpointError, NonFiniteLossError, ValueError, TypeError, OSError, ImportError)


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        app(prog_name="innerloop")
    except (*_USAGE, *_FAILURE) as error:
        if os.environ.get("INNERLOOP_DEBUG") == "1":
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        Console(stderr=True, highlight=False).print(f"[red]Error:[/red] {escape(message)}", soft_wrap=True)
        sys.exit(2 if isinstance(error, _USAGE) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
