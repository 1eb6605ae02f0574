"""Writes docs/learned-optimizer.md and its picture from benchmarks/results/learned-optimizer.json.

.venv/bin/python benchmarks/learned_optimizer_report.py     needs matplotlib, the extra `images`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learned-optimizer.json"
PAGE = HERE.parent / "docs" / "learned-optimizer.md"
PICTURE = PAGE.with_suffix(".png")
COLOURS = {"SGD": "tab:gray", "RMSprop": "tab:green", "Adam": "tab:blue", "L-BFGS": "tab:purple", "learned": "tab:red"}

TEXT = """\
# The learned optimizer

<!-- Written by benchmarks/learned_optimizer_report.py from benchmarks/results/learned-optimizer.json: change those, not
this. -->

`learned_optimizer` is the method of "Learning to learn by gradient descent by gradient descent" (Andrychowicz et al.
2016): instead of −α∇L, a two-layer LSTM of 20 units makes the update of every parameter from its gradient, with weights
that all parameters share, and those weights are what meta-training learns.

    innerloop train learned_optimizer --data quadratic --model linear --meta-batch-size 64
    innerloop train learned_optimizer --data glyphs --model mlp        # 784-20-5, sigmoid
    innerloop train learned_optimizer --data digits --model mlp --ways 10   # of MNIST: the extra `digits`
    innerloop train learned_optimizer --data glyphs                    # a small convolutional net

A task is an optimizee: the model on a support set, all of it at each step, or with `--batch-size` a minibatch drawn
anew. Query sets are only looked at to report. In `train()` a task starts
from parameters that the model's modules draw anew; in `eval()`, and in `adapt`, from the model's own.

## How it is computed

The gradients that the LSTM is given count as constants, as in the paper. So the derivative of the sum of the losses in
update k is the sum of the optimizee's gradients at the steps after k, which were computed to be the LSTM's inputs:
nothing is differentiated through the optimizee, and no graph of it is kept. Its gradients are those of the engine, one
native call for all tasks where the model lowers.

Given its gradients, a coordinate knows nothing of the others. `innerloop.ops.coordinate_lstm` takes a block of them
through preprocessing, both layers and the output in one pass, a coordinate in each lane of a vector. Its backward pass
runs a block forward again through all steps of a segment, and back, while it stays in the second cache: what is kept of
a segment is one state and the gradients, not the activations of every step. Weights' gradients are summed over fixed
ranges of coordinates in their order, so that they are the same bits for any number of threads.

Truncation: a training step goes back through one segment of 20 steps, drawn at random from the 100, and gets to it
without a gradient. The paper updates the LSTM after each segment in turn; drawn at random, a training step depends on
nothing but its tasks and its random numbers, so that a run is resumed bit for bit. What is minimised is the mean loss
of the segment.

Global averaging cells (`averaged`; the paper's appendix B) tie coordinates together: with them plain torch computes
the LSTM. They are not used below.
"""


def main() -> None:
    results = json.loads(RESULTS.read_text())
    draw(results["problems"])
    PAGE.write_text(document(results))


def document(results: dict[str, Any]) -> str:
    return "\n".join([TEXT, *figure_section(results), *speed_section(results)])


def draw(problems: dict[str, Any]) -> None:
    figure = Figure(figsize=(5.5 * len(problems), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems.values(), strict=True):
        for title, row in in_order(problem):
            median, low, high = (
                [float("nan") if value is None else value for value in values]
                for values in (row["median"], *row["quartiles"])
            )
            steps = range(len(median))
            axes.plot(steps, median, color=COLOURS[title], label=title, linewidth=2 if title == "learned" else 1.3)
            axes.fill_between(steps, low, high, color=COLOURS[title], alpha=0.12, linewidth=0)
        shown = problem["optimizers"]
        axes.set_yscale("log")
        # Where L-BFGS solves a quadratic to the last bit, its curve leaves the picture.
        axes.set_ylim(min(shown["Adam"]["median"][-1], shown["learned"]["median"][-1]) / 5, 3 * median[0])
        axes.axvline(problem["horizon"], color="black", linestyle=":", linewidth=1)
        axes.text(problem["horizon"] + 2, 1.5 * median[0], "horizon trained for", va="center", fontsize=8)
        axes.set_title(problem["title"], fontsize=10)
        axes.set_xlabel("optimization step")
        axes.set_ylabel("loss")
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(PICTURE, dpi=110)


def in_order(problem: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(title, problem["optimizers"][title]) for title in COLOURS if title in problem["optimizers"]]


def figure_section(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Loss against optimization step",
        "",
        "![Loss against optimization step](learned-optimizer.png)",
        "",
        "Medians of unseen tasks, shaded from the first to the third quartile. All start from the same parameters,",
        "drawn anew for each task. The learning rates of the others are those with the lowest median loss after 100",
        "steps on 20 training tasks, from 0.001 … 10 (SGD: … 100), three a decade; L-BFGS's, without a line search and",
        "with a gradient a step as all others, from 0.03, 0.1, 0.3, 1. Unseen glyphs are of scripts that the LSTM was",
        "not trained on. A step of the nets sees 32 of a task's 100 images, 28 × 28, drawn anew; the losses shown are",
        "of all 100, the cross-entropy, and of the quadratics ‖Wθ − y‖².",
        "",
        "At the horizon trained for the LSTM is below tuned Adam on all three, the quadratics' two intervals touching;",
        "at twice that on both nets. On the convolutional net it overtakes Adam late: at the horizon a quarter of its",
        "tasks are still above most of Adam's. L-BFGS is below all where gradients are exact, on the quadratics; on",
        "minibatches the pairs that it learns curvature from belong to different losses.",
        "",
    ]
    for name, problem in results["problems"].items():
        training, learned = problem["training"], problem["optimizers"]["learned"]
        lines += [
            f"### {problem['title']}",
            "",
            f"{problem['tasks']} unseen tasks: their median loss, its 95% interval by the bootstrap, and quartiles:",
            "",
            "| | learning rate | after 100 steps | quartiles | after 200 steps | quartiles |",
            "|---|---|---|---|---|---|",
        ]
        lines += [table_row(title, row) for title, row in in_order(problem)]
        lines += [
            "",
            f"Trained for {learned['trained_steps']:,} steps, each of {training['meta_batch_size']} task(s), Adam with "
            f"the learning rate {training['lr']:g} and a cosine schedule of {training['steps']:,} steps: "
            f"{learned['training_cpu_seconds']:.0f} s of CPU time (`learned_optimizer.py train --problems {name}`).",
            "",
        ]
    return lines


def table_row(title: str, row: dict[str, Any]) -> str:
    rate = f"{row['rate']:.2g}" if "rate" in row else ""
    cells = [title, rate]
    for at in row["at"].values():
        low, high = at["interval"]
        cells.append(f"{number(at['median'])} ({number(low)}–{number(high)})")
        cells.append("–".join(map(number, at["quartiles"])))
    return "| " + " | ".join(cells) + " |"


def number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2g}"


def speed_section(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Training speed",
        "",
        "The first segment of an optimization, 20 steps, and the gradient of the LSTM's weights: innerloop beside",
        "plain torch with nn.LSTMCell on [coordinates, …], the Linear layers of all tasks as batched products, the",
        "convolutional net by functional_call, and one autograd graph of the segment. Both computed the same gradient,",
        "checked first in float64. float32, one thread, CPU time, medians; the two take turns in one process, and × is",
        "the ratio within a turn.",
        "",
        "| | coordinates | innerloop, ms | torch, ms | × (least–most) | vectors |",
        "|---|---|---|---|---|---|",
    ]
    for problem in results["problems"].values():
        s = problem["speed"]
        ms, ratio = s["milliseconds"], s["ratio"]
        lines.append(
            f"| {problem['title']} | {s['coordinates']:,} | {ms['innerloop']:,.0f} | {ms['torch']:,.0f} | "
            f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f}) | {problem['machine']['instruction_set']} |"
        )
    lines += [
        "",
        "Times, here and of the trainings above, are of one core of a machine each that had other work to do:",
        "",
        *dict.fromkeys(map(machine_line, results["problems"].values())),
        "",
        "To repeat it:",
        "",
        "    for what in train rivals learned speed; do",
        "        .venv/bin/python benchmarks/learned_optimizer.py $what",
        "    done",
        "    .venv/bin/python benchmarks/learned_optimizer_report.py",
        "",
    ]
    return lines


def machine_line(problem: dict[str, Any]) -> str:
    m = problem["machine"]
    return (
        f"- {m['processor']}, {m['instruction_set']}, {m['fma_gflops']:.0f} GFLOP/s in fused multiply-adds a core; "
        f"Python {m['python']}, torch {m['torch']}, innerloop {m['innerloop']}; {problem['date']}"
    )


if __name__ == "__main__":
    main()
