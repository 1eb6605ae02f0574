"""Checkpoints: written whole or not at all, refused by name where they do not fit, and no pickle."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from innerloop.atomic import write_atomically
from innerloop.checkpoint import CheckpointError, load_checkpoint, previous_of, save_checkpoint


class Model(nn.Module):
    """Everything that state can be: tied parameters, integer and float buffers, float64, a 0-d and an empty tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(3, 2, generator=random))
        self.tied = self.first
        self.transposed = nn.Parameter(torch.randn(2, 3, generator=random).T)
        self.scale = nn.Parameter(torch.randn((), generator=random, dtype=torch.float64))
        self.register_buffer("empty", torch.empty(0, 4))
        self.norm = nn.BatchNorm1d(3)
        self.norm.num_batches_tracked += seed

    def loss(self) -> torch.Tensor:
        return self.first.square().sum() + self.transposed.pow(4).sum() + self.scale.square() + self.norm.weight.sum()


def trained(seed: int) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed, betas=(0.8, 0.99), amsgrad=True)
    for _ in range(seed):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    return model, optimizer


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    state, others = one.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, value in state.items():
        assert value.dtype == others[name].dtype
        assert torch.equal(value, others[name]), name


def test_module_optimizer_random_state_and_json_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    model, optimizer = trained(3)
    torch.manual_seed(7)
    save_checkpoint(path, model, {"step": 3, "nested": [{"mean": 0.1}]}, optimizer)
    expected = torch.rand(4)
    model.loss().backward()
    optimizer.step()

    other, its_optimizer = trained(5)
    assert load_checkpoint(path, other, its_optimizer) == {"step": 3, "nested": [{"mean": 0.1}]}
    assert torch.equal(torch.rand(4), expected)
    its_optimizer.zero_grad()
    other.loss().backward()
    its_optimizer.step()
    optimizer.zero_grad()
    torch.testing.assert_close(its_optimizer.param_groups[0]["betas"], [0.8, 0.99])
    assert its_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_the_next_step_is_the_same(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    save_checkpoint(tmp_path / "a", model, {}, optimizer)
    other, its_optimizer = trained(1)
    load_checkpoint(tmp_path / "a", other, its_optimizer)
    for one, its in ((model, optimizer), (other, its_optimizer)):
        its.zero_grad()
        one.loss().backward()
        its.step()
    assert_same_state(model, other)


def test_for_evaluation_neither_optimizer_nor_random_state_is_touched(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    save_checkpoint(tmp_path / "a", model, {}, optimizer)
    before = torch.get_rng_state()
    torch.rand(1)
    torch.set_rng_state(before)
    other = Model(9)
    load_checkpoint(tmp_path / "a", other)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(model, other)


def damaged(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        torch.save({"module.first": torch.zeros(2)}, path)
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:  # a header that claims more than there is
        content[0] ^= 0xFF
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut", "empty", "pickle", "missing", "folder", "header"])
def test_a_file_that_is_no_whole_checkpoint_is_named_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.safetensors"
    model, optimizer = trained(2)
    save_checkpoint(path, model, {}, optimizer)
    damaged(path, kind)
    other, its_optimizer = trained(1)
    with pytest.raises(CheckpointError, match=r"some\.safetensors cannot be read"):
        load_checkpoint(path, other, its_optimizer)
    assert_same_state(other, trained(1)[0])


def test_no_flipped_bit_is_read_silently(tmp_path: Path) -> None:
    """Wherever it is, the file is refused, or holds what was written."""
    path = tmp_path / "some.safetensors"
    model, optimizer = trained(2)
    save_checkpoint(path, model, {"step": 2}, optimizer)
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        other, its_optimizer = trained(1)
        try:
            state = load_checkpoint(path, other, its_optimizer)
        except CheckpointError as error:
            refused += str(path) in str(error)
            assert_same_state(other, trained(1)[0])
        else:
            assert state == {"step": 2}
            assert_same_state(other, model)
    assert refused > len(content) / 7 - 10  # but for the header's padding


def test_the_checkpoint_before_is_kept_and_offered(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    for step in (1, 2):
        model, optimizer = trained(step)
        save_checkpoint(path, model, {"step": step}, optimizer)
    damaged(path, "cut")
    previous = previous_of(path)
    offer = re.escape(f"{previous} (step 1), is sound: rename it to some.safetensors to use it")
    with pytest.raises(CheckpointError, match=offer):
        load_checkpoint(path, model, optimizer)
    previous.rename(path)
    assert load_checkpoint(path, model, optimizer) == {"step": 1}
    assert_same_state(model, trained(1)[0])
    damaged(path, "cut")
    with pytest.raises(CheckpointError, match=r"cannot be read: (?!.*is sound)"):
        load_checkpoint(path, model, optimizer)


def test_where_there_are_no_hard_links_none_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save_checkpoint(tmp_path / "a.safetensors", Model(1), {"step": step})
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_safetensors_file_of_somebody_else(tmp_path: Path) -> None:
    save_file({"first": torch.zeros(3, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is no checkpoint of innerloop"):
        load_checkpoint(tmp_path / "a.safetensors", Model(1))


@pytest.mark.parametrize(
    ("other", "message"),
    [(nn.Linear(2, 3), "Missing key"), (nn.Sequential(nn.Linear(2, 4), nn.ReLU()), "of another model")],
)
def test_another_model_is_refused(tmp_path: Path, other: nn.Module, message: str) -> None:
    save_checkpoint(tmp_path / "a", nn.Linear(5, 3) if isinstance(other, nn.Sequential) else Model(1), {})
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_one_without_an_optimizer_cannot_be_resumed_from(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save_checkpoint(tmp_path / "a", model, {})
    with pytest.raises(CheckpointError, match="holds no optimizer state to resume from"):
        load_checkpoint(tmp_path / "a", model, optimizer)


def test_it_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", Model(1), {"step": 4})
    with safe_open(tmp_path / "a", framework="np") as file:
        assert sorted(file.metadata()) == ["format", "json", "sha256"]
        assert file.metadata()["json"] == '{"state": {"step": 4}}'
        assert "module.first" in file.keys()  # noqa: SIM118 (no mapping, but has keys)


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_failed_write_leaves_the_old_content_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def full(self: Path, *_: object) -> None:
        if failing == "write_bytes":
            with self.open("wb") as file:
                file.write(b"ne")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, failing, full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
