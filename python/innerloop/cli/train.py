"""``innerloop train ALGORITHM``: a command for each algorithm, with the options of its constructor."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from innerloop import models
from innerloop.atomic import write_atomically
from innerloop.checkpoint import load_checkpoint
from innerloop.cli.engines import compare
from innerloop.contract import SPLITS, Dataset, Result
from innerloop.distributed import is_launched, is_restarted, process_group, rank
from innerloop.evaluation import QUERIES, evaluate
from innerloop.options import Option, OptionError, options_of, parse_numbers, parse_pairs
from innerloop.registry import algorithms, datasets
from innerloop.runs import Choice, RunConfig, default_model
from innerloop.training import BEST, LATEST, TrainingSettings, cpu_threads, fit

Command = Callable[..., None]


class TrainGroup(TyperGroup):
    """The algorithms as sub-commands; one is imported only when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """For the help alone: those that load, so that a broken plug-in breaks nobody else's help."""
        return [plugin.name for plugin, _, state in algorithms.listing() if state == "ok"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        cls = algorithms.get(cmd_name)
        single = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
        about = (inspect.getdoc(cls) or "").partition("\nArgs:")[0]  # the arguments are the options' help
        context = {"help_option_names": ["-h", "--help"]}
        single.command(cmd_name, help=about, context_settings=context)(_command(cmd_name, cls))
        return typer.main.get_command(single)


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=TrainGroup, no_args_is_help=True, rich_markup_mode=None, help=_nothing.__doc__)
    group.callback()(_nothing)
    app.add_typer(group, name="train")


def _nothing() -> None:
    """Meta-train an algorithm; `innerloop train ALGORITHM --help` shows its options."""


def _command(name: str, cls: type) -> Command:
    """A function whose signature is the command's options, which typer reads."""
    settings = options_of(TrainingSettings)
    own = options_of(cls)
    taken = {option.name for option in settings} | {
        "context", "data", "data_option", "model", "model_option", "run", "resume", "tensorboard", "evaluation_ways",
        "episodes",
    }  # fmt: skip
    # An algorithm's option with the name of a training option is offered as --algorithm-NAME.
    spelled = {f"algorithm_{option.name}" if option.name in taken else option.name: option for option in own}
    defaults = cls.training_defaults  # type: ignore[attr-defined]
    unknown = set(defaults) - {option.name for option in settings}
    if unknown:
        raise OptionError(f"{cls.__name__}.training_defaults has {sorted(unknown)[0]!r}, which is no training setting")

    def run_command(**given: Any) -> None:
        if given["resume"]:
            _refuse_new_choices(given["context"])
        options = {option.name: given[key] for key, option in spelled.items()}
        with _as_usage():
            chosen = TrainingSettings(**{field.name: given[field.name] for field in fields(TrainingSettings)})
        with process_group():
            _train(name, cls, options, chosen, given)

    parameters = [
        _parameter("context", typer.Context, inspect.Parameter.empty),
        _parameter("data", Annotated[str, typer.Option(help="The data set: see `innerloop datasets`.")], "glyphs"),
        _parameter(
            "data_option",
            Annotated[list[str], typer.Option(help="KEY=VALUE for the data set's constructor; repeatable.")],
            [],
        ),
        _parameter(
            "model",
            Annotated[
                str | None, typer.Option(help=f"The backbone: {', '.join(models.BUILDERS)}; chosen by the data.")
            ],
            None,
        ),
        _parameter("model_option", Annotated[list[str], typer.Option(help="KEY=VALUE for the model; repeatable.")], []),
        # torchrun takes --run for an abbreviation of an option of its own, hence the second name.
        _parameter(
            "run",
            Annotated[Path | None, typer.Option("--run", "--run-folder", help="Run folder; named by the time.")],
            None,
        ),
        _parameter("resume", Annotated[bool, typer.Option("--resume", help="Go on with the run in --run.")], False),
        _parameter(
            "tensorboard",
            Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events into the run folder, too.")],
            False,
        ),
        _parameter(
            "evaluation_ways",
            Annotated[int | None, typer.Option(help="Classes of a validation or test task; 5, or a head's number.")],
            None,
        ),
        _parameter("episodes", Annotated[int, typer.Option(help="Test tasks at the end.")], 600),
    ]
    parameters += [_from_option(option.name, option, "Training", defaults) for option in settings]
    parameters += [_from_option(key, option, f"Options of {name}", {}) for key, option in spelled.items()]
    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _from_option(key: str, option: Option, panel: str, defaults: Any) -> inspect.Parameter:
    default = defaults.get(option.name, inspect.Parameter.empty if option.required else option.default)
    described: dict[str, Any] = {"help": option.help or f"See {option.name}.", "rich_help_panel": panel}
    kind = option.kind
    if kind is tuple:
        described |= {"parser": parse_numbers, "metavar": "NUMBER,..."}
    if default is None:
        kind = kind | None
    return _parameter(key, Annotated[kind, typer.Option(**described)], default)


@contextmanager
def _as_usage() -> Iterator[None]:
    """What a constructor says of a value that was given is an error of usage."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from error


def _refuse_new_choices(context: typer.Context) -> None:
    """A resumed run has its options from its folder; one on the command line would silently mean nothing."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if (
            source is not None
            and source.name == "COMMANDLINE"
            and parameter.name not in ("run", "resume", "tensorboard")
        ):
            raise OptionError(f"{parameter.opts[0]} cannot be given with --resume: a run goes on with its own options")


def _train(name: str, cls: type, options: dict[str, Any], settings: TrainingSettings, given: dict[str, Any]) -> None:
    # Of several processes the first one talks and writes.
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=rank() > 0)
    run: Path | None = given["run"]
    if run is None and is_launched():
        raise OptionError("several processes need the folder of the run by name: --run-folder")
    resume = given["resume"] or (is_restarted() and run is not None and (run / LATEST).exists())
    if resume:
        if run is None:
            raise OptionError("--resume needs the folder of the run: --run")
        config = RunConfig.load(run)
        if config.algorithm.name != name:
            raise OptionError(
                f"{run} was trained with {config.algorithm.name!r}: innerloop train {config.algorithm.name}"
            )
        dataset = config.dataset()
    else:
        config, dataset = _configure(name, cls, options, settings, given)
        run = run or Path("runs") / time.strftime(f"{name}-{config.data.name}-%Y%m%d-%H%M%S")
        if rank() == 0 and not is_restarted() and run.exists() and any(run.iterdir()):
            raise FileExistsError(f"{run} is not empty: choose another --run, or go on with it by --resume")
    with _as_usage():
        _check_sizes(config, dataset)
        algorithm = config.build(dataset)
    if not resume and rank() == 0:
        config.save(run, algorithm)
    console.print(f"{name} on {config.data.name} ({config.model.name}), run folder {run}")
    with _ProgressBar(console, config.training) as progress:
        history = fit(
            algorithm,
            dataset.split("train"),
            settings=config.training,
            validation=dataset.split("val"),
            validation_ways=config.evaluation_ways,
            run=run,
            resume=resume,
            tensorboard=given["tensorboard"],
            progress=progress,
        )
    if rank() == 0:
        _draw_learning_curve(run, console)
    if history.interrupted:
        console.print(f"Interrupted; go on with: innerloop train {name} --run {run} --resume")
        raise typer.Exit(130)
    comparison = compare(algorithm, dataset.split("train"), config.training) if rank() == 0 else None
    _test(run, config, algorithm, dataset, console)
    if comparison is not None:
        console.print(comparison)


def _check_sizes(config: RunConfig, dataset: Dataset) -> None:
    """Draw a task of each part: that the data is too small for them must come up before a run begins."""
    shots = config.training.shots
    for part in SPLITS:
        ways, queries = config.evaluation_ways, QUERIES
        if part == "train":
            ways, queries = config.training.ways, config.training.queries
        try:
            dataset.split(part).sample(1, ways, shots, queries, config.training.seed)
        except ValueError as error:
            raise OptionError(f"no {part} task of {ways} ways, {shots} shots and {queries} queries: {error}") from error


def _configure(
    name: str, cls: type, options: dict[str, Any], settings: TrainingSettings, given: dict[str, Any]
) -> tuple[RunConfig, Dataset]:
    data_cls = datasets.get(given["data"])
    data_options = parse_pairs(given["data_option"], options_of(data_cls), f"the data set {given['data']}")
    dataset: Dataset = data_cls(**data_options)
    model = given["model"] or default_model(dataset)
    model_options = {
        **cls.model_defaults.get(model, {}),  # type: ignore[attr-defined]
        **parse_pairs(given["model_option"], options_of(models.build(model)), f"the model {model}"),
    }
    ways = settings.ways if cls.needs_head else 5  # type: ignore[attr-defined]
    if given["evaluation_ways"] is not None:
        if cls.needs_head and given["evaluation_ways"] != settings.ways:  # type: ignore[attr-defined]
            raise OptionError(f"{name} has a head of {settings.ways} ways: --evaluation-ways must be the same")
        ways = given["evaluation_ways"]
    config = RunConfig(
        algorithm=Choice.of(algorithms, name, options),
        model=Choice(model, model_options),
        data=Choice.of(datasets, given["data"], data_options),
        training=settings,
        evaluation_ways=ways,
        episodes=given["episodes"],
    )
    return config, dataset


def _test(run: Path, config: RunConfig, algorithm: Any, dataset: Dataset, console: Console) -> None:
    """Evaluate the best checkpoint on the test split, print and record it."""
    if (run / BEST).exists():
        load_checkpoint(run / BEST, algorithm)
    with cpu_threads(config.training.threads):
        record = evaluate(
            algorithm,
            dataset.split("test"),
            ways=config.evaluation_ways,
            shots=config.training.shots,
            episodes=config.episodes,
            seed=config.training.seed,
            distributed=True,
        )
    if rank() == 0:
        write_atomically(run / "test.json", (json.dumps(record.as_dict(), indent=2) + "\n").encode())
    console.print(f"Test {record}", style="bold")


class _TasksPerSecond(ProgressColumn):
    def render(self, task: Any) -> str:
        return f"{(task.speed or 0) * task.fields['tasks']:.0f} tasks/s"


class _ProgressBar:
    """Loss, accuracy, speed and time left; where the output is no terminal, a line now and then."""

    def __init__(self, console: Console, settings: TrainingSettings) -> None:
        self.console = console
        self.settings = settings
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _TasksPerSecond(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=settings.steps, tasks=settings.meta_batch_size)

    def __enter__(self) -> Callable[[int, Result], None]:
        self.bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _show(self, done: int, result: Result) -> None:
        text = f"loss {float(result.loss.detach()):.3f}"
        if result.accuracy is not None:
            text += f"  accuracy {100 * float(result.accuracy):.1f} %"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, description=text)
        elif done % self.settings.validate_every == 0 or done == self.settings.steps:
            self.console.print(f"step {done}/{self.settings.steps}  {text}")


def _draw_learning_curve(run: Path, console: Console) -> None:
    try:
        from innerloop.curves import draw_learning_curve
    except ImportError:
        console.print("No learning_curve.png: it needs matplotlib (pip install 'innerloop[images]')")
    else:
        draw_learning_curve(run, run / "learning_curve.png")
