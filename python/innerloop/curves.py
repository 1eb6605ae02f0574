"""The learning curve of a run as a picture (needs matplotlib, the extra ``images``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from innerloop.training import read_metrics


def draw_learning_curve(run: Path, target: Path) -> None:
    """Training loss, and the validation score with its 95% interval, over the outer steps."""
    records = read_metrics(run)
    steps = [record for record in records if "validation" not in record]
    validations = [record["validation"] for record in records if "validation" in record]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("outer step")
    axes.set_ylabel("training loss")
    if steps:
        numbers = np.array([record["step"] for record in steps])
        losses = np.array([record["loss"] for record in steps])
        axes.plot(numbers, losses, color="tab:blue", alpha=0.25, linewidth=0.5)
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(numbers[window // 2 :][: len(smooth)], smooth, color="tab:blue", label="training loss")
    if validations:
        score = axes.twinx()
        is_accuracy = validations[0]["metric"] == "accuracy"
        score.set_ylabel("validation accuracy" if is_accuracy else "validation mean squared error")
        score.errorbar(
            [record["step"] for record in validations],
            [record["mean"] for record in validations],
            yerr=[record["ci95"] for record in validations],
            color="tab:orange",
            marker="o",
            markersize=3,
            capsize=2,
        )
    axes.set_title(run.name)
    figure.savefig(target, dpi=150)
