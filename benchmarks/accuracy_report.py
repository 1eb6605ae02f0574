"""Writes docs/algorithms.md from benchmarks/results/accuracy.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accuracy import RESULTS, SETTINGS

DOCUMENT = Path(__file__).parent.parent / "docs" / "algorithms.md"

VECTORS = {"avx2": "AVX2", "avx512": "AVX-512"}
HEAD = ["5-way 1-shot", "5-way 5-shot", "20-way 1-shot", "20-way 5-shot"]

_INTRODUCTION = """\
# The few-shot classifiers

<!-- Written by benchmarks/accuracy_report.py from benchmarks/results/accuracy.json: change those, not this. -->

| algorithm | what it learns | what it does with a task | paper |
|---|---|---|---|
| `protonet` | an embedding | distances to the class means, squared Euclidean or others | Snell et al. 2017 |
| `matching_net` | an embedding; with `--full-context` also LSTMs that embed in the context of the support set | \
attention over the support samples | Vinyals et al. 2016 |
| `relation_net` | an embedding and a network that compares feature maps | its scores | Sung et al. 2018 |
| `metaoptnet` | an embedding | a linear SVM, or ridge regression, solved and differentiated through | Lee et al. 2019 |
| `r2d2` | an embedding, and λ | ridge regression in closed form | Bertinetto et al. 2019 |
| `baseline` | to tell all training classes apart | a linear classifier fitted by gradient descent | Chen et al. 2019 |
| `baseline_pp` | the same by cosine similarities | a cosine classifier, likewise | Chen et al. 2019 |
| `simpleshot` | as `baseline` | nearest mean of centred, normalised embeddings | Wang et al. 2019 |
| `finetune` | as `baseline`, or `--pretraining none`: nothing | gradient steps on the whole network | the transfer \
baseline, and the floor |
| `maml` | an initialisation | gradient steps from it | Finn et al. 2017 |
| `fomaml` | the same, without second derivatives | gradient steps from it | Finn et al. 2017 |
| `meta_sgd` | an initialisation, and a step size for each parameter | gradient steps from it | Li et al. 2017 |
| `maml_pp` | an initialisation, and step sizes, γ and β of each step | gradient steps from it | Antoniou et al. 2019 |
| `anil` | a body, and a head's initialisation | gradient steps on the head | Raghu et al. 2020 |
| `boil` | an initialisation of the body, and a head | gradient steps on the body | Oh et al. 2021 |
| `reptile` | an initialisation, moved to where gradient steps lead | gradient steps from it | Nichol et al. 2018 |
| `imaml` | an initialisation that the steps are held to | many gradient steps near it | Rajeswaran et al. 2019 |
| `proto_maml` | an embedding | gradient steps from a head of prototypes | Triantafillou et al. 2020 |

The methods from `maml` on have a head with as many outputs as a task has classes; the others take any number of
classes, whatever they were trained with, and all of those but `finetune` compare embeddings: evaluation embeds each
test image once.

## Test accuracy

On the built-in glyphs, scripts never trained on. One backbone: Conv4 of {filters} filters that halves by a stride of 2
(`relation_net`, which convolves feature maps, halves twice and no more, as in its paper). One budget: {images:,}
training images, support and query sets together, in tasks of one shot (`reptile`: five); Adam at 1e-3; the checkpoint
that was best in {validations} validations. {episodes} test tasks of 15 queries a class, the same for every row; ± is
the 95% interval over the tasks of one training, and says nothing of another seed.

    .venv/bin/python benchmarks/accuracy.py && .venv/bin/python benchmarks/accuracy_report.py

A table for each thing that BatchNorm normalises test tasks with ([numerics.md](numerics.md)): they do not compare like
with like. Options are each algorithm's defaults. Methods with a head are trained once for each number of ways, by the
same budget. CPU time is of training and validation, one thread ({processor}) with the vectors that are named, and for
these of both trainings."""

#: In what order, and under what words, the tables by BatchNorm's mode come.
_MODES = {
    "running": "Running statistics: each test image is embedded by itself.",
    "support": "The support set's statistics:",
    "transductive": """\
Transductive, the statistics of the support set, then of the task's queries together. `imaml`'s defaults do not suit 20
ways: its inner loop did not reach a minimum, where conjugate gradients meet negative curvature and stop (1,003 of the
first 1,228 tasks of training), and the best of its validations was the first.""",
    "per_step": "Transductive, with a γ and a β of each inner step (MAML++):",
}

_PAPERS = """\
**These are the papers' numbers, not measured here**, with other data, budgets and networks than the table above: they
say what the methods reach where they were published. They are quoted from where it is said; "–" is a number for which
no source was at hand, and SimpleShot and fine-tuning are left out for the same reason. BatchNorm's mode is read from
the authors' code where there is a link, else "not stated"."""

_ORDERS = """\
The bidirectional LSTM of the full context embeddings reads the support set in order, so that a shuffled support set is
another input; attention alone does not care. Data sets here hand out support sets class by class, and a network trained
on those may come to rely on it. The same tasks, in both orders; trained as the row says."""

#: Method, cells, network, BatchNorm, where it is quoted from.
OMNIGLOT = [
    ("matching_net", ["98.1", "98.9", "93.8", "98.5"], "Conv4-64", "not stated", "oscarknagg/few-shot"),
    ("protonet", ["98.8", "99.7", "96.0", "98.9"], "Conv4-64", "running", "oscarknagg/few-shot"),
    ("relation_net", ["99.6 ± 0.2", "99.8 ± 0.1", "–", "–"], "Conv4-64", "transductive", "PaddleFSL"),
    ("maml", ["98.7 ± 0.4", "99.9 ± 0.1", "95.8", "98.9"], "Conv4-64", "transductive", "PaddleFSL, andrewbo29"),
]
MINIIMAGENET = [
    ("matching_net", ["44.2", "57.0"], "Conv4-64", "not stated", "oscarknagg/few-shot"),
    ("protonet", ["49.42 ± 0.78", "68.20 ± 0.66"], "Conv4-64", "running", "PaddleFSL"),
    ("relation_net", ["50.44 ± 0.82", "65.32 ± 0.70"], "Conv4-64", "transductive", "PaddleFSL"),
    ("baseline", ["42.11", "62.53"], "Conv4-64", "running", "LibFewShot"),
    ("baseline_pp", ["48.24", "66.43"], "Conv4-64", "running", "LibFewShot"),
    ("maml", ["48.70 ± 1.84", "63.11 ± 0.92"], "Conv4-32", "transductive", "PaddleFSL"),
    ("anil", ["46.7 ± 0.4", "61.5 ± 0.5"], "Conv4-32", "not stated", "PaddleFSL"),
]

_SOURCES = """\
Quoted from, on GitHub: oscarknagg/few-shot (README, "published"); PaddlePaddle/PaddleFSL (image classification,
"original paper"); andrewbo29/mtm-meta-learning-sa (k.khabarlak-maml/model-performance.md); RL-VIG/LibFewShot
(reproduce/README, "reported"); cainiaomyf/FSL-Insight (Metric.md). BatchNorm from: cbfinn/maml (utils.py: batch
statistics always), jakesnell/prototypical-networks (utils/model.py: eval), floodsung/LearningToCompare_FSL
(omniglot_test_one_shot.py: never in eval mode), kjunelee/MetaOptNet (test.py: eval), bertinetto/r2d2 (utils/model.py:
eval), wyharveychen/CloserLookFewShot (save_features.py: eval)."""


def main() -> None:
    DOCUMENT.write_text("\n".join(document(json.loads(RESULTS.read_text()))) + "\n")


def document(results: dict[str, Any]) -> Iterator[str]:
    rows = results["rows"]
    facts = {**results, **results["backbone"], **results["machine"]}
    yield from _INTRODUCTION.format(**facts).splitlines()
    for mode, words in _MODES.items():
        chosen = {title: trainings for title, trainings in rows.items() if bn_of(trainings) == mode}
        if not chosen:
            continue
        yield from ("", words, "")
        yield from table(
            ["", *HEAD, "CPU time, s", "vectors"], (accuracy_row(title, row) for title, row in chosen.items())
        )
    yield from ("", "The commands, in the order of the rows (those without one are not trained by a command):", "")
    yield from (f"    {command}" for command in commands(rows))
    yield from ("", "## Matching networks: context, and the order of the support set", "", *_ORDERS.splitlines(), "")
    yield from table(
        ["", "support sets", *HEAD],
        (row for title, trainings in rows.items() for row in order_rows(title, trainings)),
    )
    yield from ("", "## What the papers report", "", *_PAPERS.splitlines(), "", "Omniglot:", "")
    yield from table(["", *HEAD, "network", "BatchNorm", "quoted from"], map(quoted, OMNIGLOT))
    yield from ("", "miniImageNet, 5-way:", "")
    yield from table(["", "1-shot", "5-shot", "network", "BatchNorm", "quoted from"], map(quoted, MINIIMAGENET))
    yield from ("", *_SOURCES.splitlines())


def accuracy_row(title: str, trainings: dict[str, Any]) -> list[str]:
    evaluations = [result for training in trainings.values() for result in training["evaluations"]]
    seconds = sum(training["seconds"] for training in trainings.values())
    (vectors,) = {training["instruction_set"] for training in trainings.values()}
    return [title, *cells(evaluations), f"{seconds:.0f}", VECTORS.get(vectors, vectors)]


def bn_of(trainings: dict[str, Any]) -> str:
    (mode,) = {result["bn"] for training in trainings.values() for result in training["evaluations"]}
    return str(mode)


def commands(rows: dict[str, Any]) -> Iterator[str]:
    """Each once: variants of a row share their training."""
    trainings = (training for trainings in rows.values() for training in trainings.values())
    yield from dict.fromkeys(training["command"] for training in trainings if training["command"])


def order_rows(title: str, trainings: dict[str, Any]) -> Iterator[list[str]]:
    training = trainings.get("any", {})
    if "shuffled" in training:
        yield [title, "class by class", *cells(training["evaluations"])]
        yield ["", "shuffled", *cells(training["shuffled"])]


def cells(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracies in the order of the settings."""
    by_setting = {(result["ways"], result["shots"]): result for result in evaluations}
    return [percent(by_setting[setting]) if setting in by_setting else "–" for setting in SETTINGS]


def percent(result: dict[str, Any]) -> str:
    return f"{100 * result['mean']:.1f} ± {100 * result['ci95']:.1f}"


def quoted(row: tuple[str, list[str], str, str, str]) -> list[str]:
    method, accuracies, network, mode, source = row
    return [f"{method} (theirs)", *accuracies, network, mode, source]


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


if __name__ == "__main__":
    main()
