"""What makes a step fast is left again, with a reason, where it fails, differs or does not pay."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from doremi_mix import engine, loss
from doremi_mix.dro import GroupDRO
from doremi_mix.engine import EngineSettings, is_sharded, make_accelerator, prepare, with_host_facts
from doremi_mix.models import TokenInfo, build_model
from doremi_mix.objectives import PlainObjective, ProxyObjective, forward
from doremi_mix.types import Domains


@pytest.fixture
def model(model_config):
    return build_model(str(model_config), TokenInfo(50, 1, 0), 12, seed=0)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (6, 12), generator=generator)
    labels = ids.roll(-1, 1).masked_fill(torch.rand(6, 12, generator=generator) < 0.3, -100)
    return {
        "input_ids_BT": ids,
        "labels_BT": labels,
        "position_ids_BT": torch.arange(12).expand(6, 12),
        "document_ids_BT": torch.zeros(6, 12, dtype=torch.int32),
        "domain_ids_B": torch.arange(6) % 3,
        "reference_loss_BT": torch.rand(6, 12, generator=generator) * 4,
    }


def prepared(model, batch, num_passes=10**9, **settings):
    said = []
    prepare(model, EngineSettings(**settings), make_accelerator(), batch, num_passes, said.append)
    return said


def test_on_a_cpu_nothing_is_compiled_unless_asked_for(model, batch, monkeypatch):
    monkeypatch.setattr(engine, "compile_blocks", lambda _model: pytest.fail("compiled"))
    assert prepared(model, batch) == []
    assert prepared(model, batch, compile=False) == []


def test_a_compiler_that_fails_is_left(model, batch, monkeypatch):
    before = forward(model, batch)
    monkeypatch.setattr(
        engine,
        "compile_blocks",
        lambda model: setattr(
            engine.blocks(model)[0],
            "_compiled_call_impl",
            lambda *_a, **_k: exec("raise RuntimeError('no g++\\nlong')"),
        ),
    )
    assert prepared(model, batch, compile=True) == ["  torch.compile is off: it failed (no g++)"]
    assert torch.equal(forward(model, batch), before)


def test_a_compiler_that_fails_without_a_word_is_left(model, batch, monkeypatch):
    def fails(*_arguments, **_settings):
        raise RuntimeError

    monkeypatch.setattr(
        engine, "compile_blocks", lambda model: setattr(engine.blocks(model)[0], "_compiled_call_impl", fails)
    )
    assert prepared(model, batch, compile=True) == ["  torch.compile is off: it failed (RuntimeError)"]


def test_a_compiler_that_changes_the_numbers_is_left(model, batch, monkeypatch):
    before = forward(model, batch)

    def wrong(model):
        block = engine.blocks(model)[0]
        block._compiled_call_impl = lambda hidden, *a, **k: block._call_impl(hidden.roll(1, -1), *a, **k)

    monkeypatch.setattr(engine, "compile_blocks", wrong)
    assert prepared(model, batch, compile=True) == ["  torch.compile is off: its numbers differ from the plain model's"]
    assert torch.equal(forward(model, batch), before)


def test_a_compiler_that_is_asked_for_stays(model, batch, monkeypatch):
    monkeypatch.setattr(engine, "compile_blocks", lambda _model: None)
    (line,) = prepared(model, batch, compile=True)
    assert line.startswith("  torch.compile is on: ")


def test_preparing_leaves_weights_and_gradients_alone(model, batch, monkeypatch):
    before = [parameter.clone() for parameter in model.parameters()]
    monkeypatch.setattr(engine, "compile_blocks", lambda _model: None)
    prepared(model, batch, compile=True, gradient_checkpointing=True)
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
        assert parameter.grad is None


def test_the_launchers_flag_asks_for_a_split_model(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(engine.SHARD, "0")
    make_accelerator()
    assert is_sharded(EngineSettings(), num_processes=2)
    assert not is_sharded(EngineSettings(shard=False), num_processes=2)
    assert not is_sharded(EngineSettings(shard=True), num_processes=1)


def test_gradient_checkpointing_keeps_less_and_changes_nothing(model, batch):
    def run():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t
        ):
            loss = forward(model, batch).sum()
        return sum(kept), torch.autograd.grad(loss, model.model.get_input_embeddings().weight)[0]

    plain, gradient = run()
    prepared(model, batch, gradient_checkpointing=True)
    checkpointed, same = run()
    assert checkpointed < plain
    assert torch.equal(gradient, same)


class Asked(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.strip("_") in {name.strip("_") for name in self.WAITING}:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "objective",
    [PlainObjective(), ProxyObjective(Domains(("a", "b", "c")), GroupDRO(step_size=1.0, smoothing=1e-3))],
    ids=["plain", "dro"],
)
def test_a_step_never_asks_the_device(model, batch, objective, monkeypatch):
    monkeypatch.setattr(loss, "_check_labels", lambda *_: None)  # on a CPU only, which waits for nobody
    accelerator = make_accelerator()
    batch = with_host_facts(batch, model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        logged = objective.backward(model, [batch], accelerator)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return logged, norm

    step()
    with Asked() as asked:
        step()
    assert asked.seen == []


def test_asking_is_noticed():
    with Asked() as asked:
        torch.ones(3).sum().item()
    assert asked.seen == ["aten._local_scalar_dense.default"]
