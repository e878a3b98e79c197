"""Checkpoints are written while training goes on, whole or not at all."""

import resource
import threading

import pytest
import torch

from doremi_mix import checkpoints
from doremi_mix.checkpoints import (
    cut_log,
    load_checkpoint,
    open_writer,
    restore_training_state,
    save_checkpoint,
    training_state,
)
from doremi_mix.models import TokenInfo, build_model


def trained(model_config, seed, steps):
    model = build_model(str(model_config), TokenInfo(50, 1, 0), 12, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(steps):
        advance(model, optimizer, step)
    return model, optimizer


def advance(model, optimizer, step):
    ids = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(step))
    model(ids, ids.roll(-1, 1), torch.arange(12).expand(2, 12), torch.zeros_like(ids)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def write_last(folder, then=lambda: None):
    with open_writer(folder) as writer:
        writer.save({"step": 1})
        then()


def test_restored_training_goes_on_with_the_same_numbers(model_config, tmp_path):
    model, optimizer = trained(model_config, 0, 3)
    save_checkpoint(tmp_path, training_state(model, optimizer, sharded=False))
    advance(model, optimizer, 3)
    other, other_optimizer = trained(model_config, 1, 1)
    restore_training_state(other, other_optimizer, load_checkpoint(tmp_path))
    advance(other, other_optimizer, 3)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_frozen_base_is_no_state(model_config):
    model, _ = trained(model_config, 0, 1)
    model.requires_grad_(False)
    name, parameter = next(iter(model.named_parameters()))
    parameter.requires_grad_(True)
    state = training_state(model, torch.optim.AdamW([parameter]), sharded=False)
    assert name == "model.model.embed_tokens.weight"
    assert set(state["model"]) == {name, "model.lm_head.weight"}  # tied to it, so trained, too
    parameter.requires_grad_(False)
    (other, bias), *_ = ((name, p) for name, p in model.named_parameters() if "layernorm" in name)
    bias.requires_grad_(True)
    assert set(training_state(model, torch.optim.AdamW([bias]), sharded=False)["model"]) == {other}


def test_training_changes_nothing_in_a_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    """The writer thread is held up while the tensors change in place."""
    go = threading.Event()
    original = save_checkpoint

    def slow(folder, state):
        go.wait(10)
        original(folder, state)

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    weights = torch.ones(3)
    with open_writer(tmp_path) as writer:
        writer.save({"step": 1, "nested": {"list": [weights]}})
        weights.add_(1)
        assert load_checkpoint(tmp_path) is None
        go.set()
    assert torch.equal(load_checkpoint(tmp_path)["nested"]["list"][0], torch.ones(3))


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock, began, may_end = iter([100.0, 102.0, 119.9, 120.1]), threading.Event(), threading.Event()

    def save(_folder, _state):
        began.set()
        may_end.wait(10)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(clock))
    with open_writer(tmp_path) as writer:
        assert writer.has_time()
        writer.save({})
        assert began.wait(10)
        assert not writer.has_time()  # it is being written
        may_end.set()
        writer.wait()
        assert [writer.has_time() for _ in range(2)] == [False, True]  # 2 s of 20


def test_a_full_disk_is_told_as_such(tmp_path):
    """torch.save itself speaks of its archive's format."""
    save_checkpoint(tmp_path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, {"weights": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_write_that_fails_is_an_error_and_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    def full(_state, _file):
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, {"step": 1})
    monkeypatch.setattr(torch, "save", full)
    with open_writer(tmp_path) as writer:
        writer.save({"step": 2})
        with pytest.raises(OSError, match="No space left on device"):
            writer.save({"step": 3})
    with pytest.raises(OSError, match="No space left on device"):
        write_last(tmp_path)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path) == {"step": 1}


def test_an_error_in_training_is_not_hidden_by_the_writer(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_last(tmp_path, then=lambda: 1 // 0)
    assert load_checkpoint(tmp_path) == {"step": 1}


def test_a_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, 0)
    assert log.read_bytes() == b""
    log.write_bytes(b"1\n2\n3\nhal")
    cut_log(log, 2)
    assert log.read_bytes() == b"1\n2\n"
