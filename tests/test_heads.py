"""What each of the embedding and transfer papers says, written plainly, against what the algorithms compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop
from algorithm_cases import SHAPE, Case, build, data
from command_line import CommandLine
from innerloop import TaskBatch
from innerloop.algorithms.matching_net import QueryContext, SupportContext
from innerloop.linear_probe import fit_probe
from innerloop.models import conv4, output_shape

D = 6


def vectors(tasks: int = 2, support: int = 9, query: int = 4, ways: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """support [T, S, D], labels [T, S], query [T, Q, D]; float64."""
    random = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randperm(support, generator=random) % ways for _ in range(tasks)])
    draw = [torch.randn(tasks, count, D, generator=random, dtype=torch.float64) for count in (support, query)]
    return draw[0], labels, draw[1]


def new(name: str, **options: Any) -> innerloop.Algorithm:
    torch.manual_seed(0)
    return innerloop.get(name)(nn.Identity(), **options).double().eval()


# --- Prototypical networks --------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "dot"])
def test_protonet_compares_queries_with_class_means(metric: str) -> None:
    support, labels, query = vectors()
    logits = new("protonet", metric=metric, temperature=2.0).classify(support, labels, query, 3)
    for t in range(2):
        for n in range(3):
            mean = support[t][labels[t] == n].mean(0)
            for q in range(4):
                x = query[t, q]
                expected = {
                    "sqeuclidean": -(x - mean).square().sum(),
                    "euclidean": -(x - mean).norm(),
                    "cosine": F.cosine_similarity(x, mean, dim=0) - 1,
                    "dot": x @ mean,
                }[metric]
                torch.testing.assert_close(logits[t, q, n], expected / 2)


# --- Matching networks ------------------------------------------------------------------------------


def plain_lstm(x: Tensor, h: Tensor, c: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: x input, h output, c cell; weights as torch keeps them."""
    w_input, w_hidden, b_input, b_hidden = weights
    i, f, g, o = (w_input @ x + b_input + w_hidden @ h + b_hidden).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def test_full_context_embeddings_are_those_of_the_appendix() -> None:
    algorithm = new("matching_net", input_shape=(D,), full_context=True, reads=3, temperature=0.5)
    support, labels, query = vectors(tasks=1)
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def read(order: list[int], suffix: str) -> list[Tensor]:
        h = c = torch.zeros(D, dtype=torch.float64)
        weights = tuple(getattr(algorithm.g.lstm, f"{part}_l0{suffix}") for part in parts)
        outputs: list[Any] = [None] * len(order)
        for i in order:
            h, c = plain_lstm(support[0, i], h, c, weights)
            outputs[i] = h
        return outputs

    forwards, backwards = read(list(range(9)), ""), read(list(range(8, -1, -1)), "_reverse")
    g = torch.stack([f + b for f, b in zip(forwards, backwards, strict=True)]) + support[0]

    cell = algorithm.f.lstm
    rows = []
    for x in query[0]:
        h = c = torch.zeros(D, dtype=torch.float64)
        for _ in range(3):
            attention = (g @ h).softmax(0)
            r = attention @ g
            # The paper's state is [h, r]: the columns of the input weights that meet r belong to it.
            weights = (
                cell.weight_ih[:, :D],
                torch.cat((cell.weight_hh, cell.weight_ih[:, D:]), 1),
                cell.bias_ih,
                cell.bias_hh,
            )
            out, c = plain_lstm(x, torch.cat((h, r)), c, weights)
            h = out + x
        similarity = F.cosine_similarity(h[None], g, dim=1)
        attention = (similarity / 0.5).softmax(0)
        rows.append(torch.stack([attention[labels[0] == n].sum() for n in range(3)]).log())
    actual = algorithm.classify(support, labels, query, 3)[0]
    torch.testing.assert_close(actual, torch.stack(rows))


def test_the_order_of_the_support_set_matters_to_full_context_alone() -> None:
    support, labels, query = vectors()
    shuffle = torch.tensor([4, 8, 0, 2, 7, 1, 6, 3, 5])
    for full_context in (False, True):
        algorithm = new("matching_net", input_shape=(D,), full_context=full_context)
        ordered = algorithm.classify(support, labels, query, 3)
        shuffled = algorithm.classify(support[:, shuffle], labels[:, shuffle], query, 3)
        assert torch.allclose(ordered, shuffled) is not full_context


def test_contexts_read_no_padding_wherever_it_stands() -> None:
    torch.manual_seed(0)
    g, f = SupportContext(D).double(), QueryContext(D, reads=2).double()
    support, _, query = vectors()
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    embedded = g(support, mask)
    read = f(query, embedded, mask)
    for t in range(2):
        alone = g(support[t : t + 1, mask[t]])
        torch.testing.assert_close(embedded[t, mask[t]], alone[0])
        torch.testing.assert_close(read[t], f(query[t : t + 1], alone)[0])


# --- MetaOptNet and R2-D2 ---------------------------------------------------------------------------


def plain_ridge(x: Tensor, labels: Tensor, rate: float | Tensor) -> Tensor:
    """(XᵀX + λI)⁻¹ XᵀY of one task."""
    y = F.one_hot(labels, 3).to(x.dtype)
    return torch.linalg.solve(x.T @ x + rate * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def test_metaoptnet_scales_the_scores_of_ridge_regression() -> None:
    support, labels, query = vectors()
    algorithm = new("metaoptnet", head="ridge", regularization=0.7)
    algorithm.scale.data.fill_(3)
    expected = torch.stack([3 * query[t] @ plain_ridge(support[t], labels[t], 0.7) for t in range(2)])
    torch.testing.assert_close(algorithm.classify(support, labels, query, 3), expected)


def test_metaoptnet_scales_the_scores_of_a_svm() -> None:
    """Those that minimise ½ Σ‖w_k‖² + C Σ ξ, which no small step from them does better."""
    support, labels, query = vectors()
    algorithm = new("metaoptnet", C=0.3)
    algorithm.scale.data.fill_(3)
    axes = torch.eye(D, dtype=torch.float64).expand(2, D, D)
    weights = algorithm.classify(support, labels, axes, 3) / 3  # the scores of the unit vectors: [T, D, N]
    torch.testing.assert_close(algorithm.classify(support, labels, query, 3), 3 * query @ weights)

    def objective(w: Tensor, t: int) -> Tensor:
        scores = support[t] @ w
        margins = scores + 1 - F.one_hot(labels[t], 3) - scores.gather(1, labels[t][:, None])
        return 0.5 * w.square().sum() + 0.3 * margins.amax(1).sum()

    torch.manual_seed(0)
    for t in range(2):
        for _ in range(50):
            step = 1e-3 * torch.randn(D, 3, dtype=torch.float64)
            assert objective(weights[t] + step, t) > objective(weights[t], t) - 1e-9


def test_r2d2_is_ridge_regression_of_means_with_a_bias() -> None:
    support, labels, query = vectors()
    algorithm = new("r2d2", regularization=0.5, scale=4.0)
    algorithm.bias.data.fill_(0.25)
    one = torch.ones(1, dtype=torch.float64)
    rows = []
    for t in range(2):
        x = torch.cat((support[t], one.expand(9, 1)), 1)
        y = F.one_hot(labels[t], 3).double()
        w = torch.linalg.solve(x.T @ x / 9 + 0.5 * torch.eye(D + 1, dtype=torch.float64), x.T @ y / 9)
        rows.append(4 * torch.cat((query[t], one.expand(4, 1)), 1) @ w + 0.25)
    torch.testing.assert_close(algorithm.classify(support, labels, query, 3), torch.stack(rows))


@pytest.mark.parametrize(("name", "learned"), [("metaoptnet", ["scale"]), ("r2d2", ["log_regularization", "scale"])])
def test_what_scales_and_regularises_is_learned(name: str, learned: list[str]) -> None:
    support, labels, query = vectors()
    algorithm = new(name)
    F.cross_entropy(algorithm.classify(support, labels, query, 3)[0], torch.tensor([0, 1, 2, 0])).backward()
    assert all(algorithm.get_parameter(parameter).grad != 0 for parameter in learned)


# --- Relation networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_relation_scores_are_of_concatenated_feature_maps(mode: str, pooling: str) -> None:
    algorithm = build(Case("relation_net", {"pooling": pooling})).double()
    getattr(algorithm, mode)()
    tasks = data().split("train").sample(2, 3, 2, 2, seed=0).to(torch.float64)
    support, query = (algorithm.embed(x.flatten(0, 1)).unflatten(0, (2, -1)) for x in (tasks.support_x, tasks.query_x))
    pairs = []
    for t in range(2):
        maps = [getattr(support[t][tasks.support_y[t] == n], pooling)(0) for n in range(3)]
        pairs += [torch.cat((class_map, x)) for x in query[t] for class_map in maps]
    expected = algorithm.relation(algorithm.compare(torch.stack(pairs))).reshape(2, 6, 3)
    torch.testing.assert_close(algorithm.classify(support, tasks.support_y, query, 3), expected)


def test_relation_loss_is_the_squared_error_to_one_and_zero() -> None:
    algorithm = build(Case("relation_net")).eval()
    result = algorithm(data().split("train").sample(2, 3, 1, 2, seed=0))
    scores = result.logits.sigmoid()
    for t in range(2):
        right = torch.eye(3).repeat_interleave(2, 0)
        torch.testing.assert_close(result.task_losses[t], (scores[t] - right).square().mean())


# --- pre-training, and what follows it --------------------------------------------------------------


@pytest.mark.parametrize("name", ["baseline", "baseline_pp", "simpleshot", "finetune"])
def test_pretraining_is_the_cross_entropy_of_all_training_classes(name: str) -> None:
    algorithm = build(Case(name)).train()
    part = data().split("train")
    tasks = part.sample(6, 2, 1, 2, seed=3)
    result = algorithm(tasks)
    images = torch.cat((tasks.support_x, tasks.query_x), 1).flatten(0, 1)
    of_image = {part.to_input(image[None]).numpy().tobytes(): index // 18 for index, image in enumerate(part.examples)}
    classes = torch.tensor([of_image[image.numpy().tobytes()] for image in images])  # train holds the first 24 classes
    logits = algorithm.classifier(algorithm.model(images).flatten(1))
    torch.testing.assert_close(result.loss, F.cross_entropy(logits, classes))
    assert result.logits.shape == (6, 6, 24)


@pytest.mark.parametrize("name", ["baseline", "finetune"])
def test_pretraining_needs_the_classes(name: str) -> None:
    algorithm = build(Case(name)).train()
    tasks = data().split("train").sample(2, 3, 1, 1, seed=0)
    nameless = TaskBatch(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
    with pytest.raises(ValueError, match=r"tasks\.classes is None: pre-training needs to know"):
        algorithm(nameless)
    foreign = TaskBatch(*(getattr(nameless, part) for part in ("support_x", "support_y", "query_x", "query_y")),
                        classes=tasks.classes + 24)  # fmt: skip
    with pytest.raises(ValueError, match=r"tasks\.classes holds \d+, expected 0 … 23"):
        algorithm(foreign)


def test_data_without_numbered_classes_cannot_be_pretrained_on(innerloop_cli: CommandLine) -> None:
    message = innerloop_cli("train", "baseline", "--data", "sinusoid", code=2)
    assert "baseline learns to tell all training classes apart, and this data set does not number them" in message


def test_a_probe_reaches_the_minimum_of_regularised_cross_entropy() -> None:
    support, labels, _ = vectors()
    start = [torch.zeros(2, D, 3, dtype=torch.float64)]
    with torch.inference_mode():
        (weight,) = fit_probe(torch.bmm, start, support.clone(), labels, steps=3000, lr=1.0, weight_decay=0.1)
    for t in range(2):
        w = weight[t].clone().requires_grad_()
        objective = F.cross_entropy(support[t] @ w, labels[t]) + 0.05 * w.square().sum()
        assert torch.autograd.grad(objective, w)[0].abs().max() < 1e-8


def test_baseline_starts_from_nothing_and_baseline_pp_from_the_class_means() -> None:
    support, labels, query = vectors()
    facts = {"input_shape": (D,), "training_classes": 5, "probe_steps": 0}
    assert not new("baseline", **facts).classify(support, labels, query, 3).any()
    directions = torch.stack(
        [torch.stack([F.normalize(support[t][labels[t] == n], dim=1).mean(0) for n in range(3)]) for t in range(2)]
    )
    expected = 7 * F.cosine_similarity(query[:, :, None], directions[:, None], dim=3)
    torch.testing.assert_close(new("baseline_pp", scale=7.0, **facts).classify(support, labels, query, 3), expected)


@pytest.mark.parametrize("transform", ["un", "l2n", "cl2n"])
def test_simpleshot_transforms_then_compares_with_class_means(transform: str) -> None:
    algorithm = new("simpleshot", input_shape=(D,), training_classes=5, transform=transform)
    algorithm.training_mean.copy_(torch.arange(D) / 10)
    support, labels, query = vectors()

    def transformed(x: Tensor) -> Tensor:
        if transform == "cl2n":
            x = x - torch.arange(D) / 10
        return x if transform == "un" else x / x.norm()

    logits = algorithm.classify(support, labels, query, 3)
    for t in range(2):
        for n in range(3):
            centroid = torch.stack([transformed(x) for x in support[t][labels[t] == n]]).mean(0)
            for q in range(4):
                expected = -(transformed(query[t, q]) - centroid).square().sum()
                torch.testing.assert_close(logits[t, q, n], expected)


def test_simpleshot_keeps_the_mean_of_the_training_embeddings() -> None:
    algorithm = new("simpleshot", input_shape=(D,), training_classes=1).train()
    seen = torch.randn(250, 4, D, dtype=torch.float64) + 3
    for number, x in enumerate(seen, start=1):
        algorithm.embed(x)
        if number <= 100:  # the mean of all there was
            torch.testing.assert_close(algorithm.training_mean, seen[:number].mean((0, 1)))
    weights = 0.99 ** torch.arange(149, -1, -1, dtype=torch.float64)  # then each newer batch counts 1%
    expected = 0.99**150 * seen[:100].mean((0, 1)) + (0.01 * weights[:, None] * seen[100:].mean(1)).sum(0)
    torch.testing.assert_close(algorithm.training_mean, expected)
    algorithm.eval().embed(seen[0])
    torch.testing.assert_close(algorithm.training_mean, expected)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_finetune_is_gradient_descent_on_the_support_set_from_a_head_of_zeros(engine: str) -> None:
    algorithm = build(Case("finetune", {"inner_steps": 3, "inner_lr": 0.2, "bn": "running", "engine": engine}))
    algorithm = algorithm.double().eval()
    tasks = data().split("test").sample(1, 3, 2, 2, seed=0).to(torch.float64)
    network = nn.Sequential(algorithm.model, nn.Flatten(), nn.Linear(128, 3)).double()
    nn.init.zeros_(network[2].weight)
    nn.init.zeros_(network[2].bias)
    parameters = {name: value.detach().clone() for name, value in network.named_parameters()}
    for _ in range(3):
        leaves = {name: value.requires_grad_() for name, value in parameters.items()}
        loss = F.cross_entropy(torch.func.functional_call(network, leaves, tasks.support_x[0]), tasks.support_y[0])
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        parameters = {
            name: (value - 0.2 * gradient).detach()
            for (name, value), gradient in zip(leaves.items(), gradients, strict=True)
        }
    expected = torch.func.functional_call(network, parameters, tasks.query_x[0])
    torch.testing.assert_close(algorithm(tasks).logits[0], expected.detach())


# --- options ----------------------------------------------------------------------------------------

KNOWN = {"input_shape": SHAPE, "training_classes": 24}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("protonet", {"metric": "cosin"}, "metric is 'cosin'.*Did you mean 'cosine'"),
        ("matching_net", {"full_context": True}, "input_shape is None, but full_context needs it"),
        ("matching_net", {"reads": 0}, "reads is 0, expected at least 1"),
        ("relation_net", {"pooling": "max", "input_shape": SHAPE}, "pooling is 'max', expected 'mean' or 'sum'"),
        ("relation_net", {"input_shape": (1, 4, 4)}, r"embeddings of shape \[8, 2, 2\], expected feature maps"),
        ("metaoptnet", {"head": "svn"}, "head is 'svn', expected 'svm' or 'ridge'"),
        ("metaoptnet", {"C": 0.0}, r"C is 0\.0, expected a positive number"),
        ("metaoptnet", {"regularization": -1.0}, r"regularization is -1\.0, expected a positive number"),
        ("r2d2", {"regularization": 0.0}, r"regularization is 0\.0, expected a positive number"),
        ("baseline", {**KNOWN, "probe_steps": -1}, "probe_steps is -1"),
        ("baseline", {**KNOWN, "probe_lr": 0.0}, r"probe_lr is 0\.0, expected a positive number"),
        ("baseline_pp", {**KNOWN, "weight_decay": -1.0}, r"weight_decay is -1\.0"),
        ("baseline_pp", {**KNOWN, "scale": 0.0}, r"scale is 0\.0, expected a positive number"),
        ("simpleshot", {**KNOWN, "transform": "l2"}, "transform is 'l2', expected 'cl2n', 'l2n' or 'un'"),
        ("finetune", {**KNOWN, "pretraining": "some"}, "pretraining is 'some', expected 'classes' or 'none'"),
        ("finetune", {**KNOWN, "inner_steps": -1}, "inner_steps is -1"),
        ("finetune", {**KNOWN, "bn": "batch"}, "bn is 'batch'"),
        ("finetune", {**KNOWN, "engine": "nativ"}, "engine is 'nativ'"),
    ],
)
def test_bad_options_are_refused_at_construction(name: str, options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2))
    with pytest.raises(ValueError, match=message):
        innerloop.get(name)(model, **options)


def test_facts_of_the_data_are_no_options(innerloop_cli: CommandLine) -> None:
    printed = innerloop_cli("train", "baseline", "--help")
    assert "--probe-steps" in printed
    assert "--input-shape" not in printed
    assert "--training-classes" not in printed


# --- backbones --------------------------------------------------------------------------------------


@pytest.mark.parametrize("downsample", ["pool", "stride"])
@pytest.mark.parametrize(("halvings", "side"), [(4, {"pool": 1, "stride": 2}), (2, {"pool": 7, "stride": 7}), (0, 28)])
def test_conv4_without_a_head_gives_feature_maps(downsample: str, halvings: int, side: Any) -> None:
    model = conv4(outputs=None, filters=3, downsample=downsample, halvings=halvings)
    size = side if isinstance(side, int) else side[downsample]
    training = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone()
    assert output_shape(model, (1, 28, 28)) == (3, size, size)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(model[1].running_mean, statistics)
    headed = conv4(outputs=5, filters=3, downsample=downsample, halvings=halvings)
    assert output_shape(headed, (1, 28, 28)) == (5,)


def test_conv4_refuses_what_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match="halvings is 5, expected 0 … 4"):
        conv4(halvings=5)
    with pytest.raises(ValueError, match="expected at least 16 × 16 pixels"):
        conv4((1, 8, 8))
    conv4((1, 8, 8), halvings=3)
