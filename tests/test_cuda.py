"""What only a GPU can show: its kernels, graphs and copies give the numbers of a CPU."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import read_log
from test_models import packed

from doremi_mix import attention
from doremi_mix.adapters import LoraSettings, set_adapter_dropout
from doremi_mix.attention import NAMES, attention_inputs, choose_attention, document_mask, document_starts
from doremi_mix.batches import Schedule
from doremi_mix.dro import GroupDRO, domain_sums
from doremi_mix.engine import EngineSettings, has_bf16, make_accelerator, prepare, to_device, with_host_facts
from doremi_mix.loss import BLOCKS, LossKernel, linear_cross_entropy, select_loss_kernel
from doremi_mix.loss_kernels import CUDA_KERNELS
from doremi_mix.models import TokenInfo, build_model, disable_gradient_checkpointing, save_model, undo_compile
from doremi_mix.models import enable_gradient_checkpointing as enable_checkpointing
from doremi_mix.objectives import PlainObjective, ProxyObjective, forward
from doremi_mix.progress import Narrator
from doremi_mix.train import TrainingPlan, train
from doremi_mix.types import Domains

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda")
VOCAB, T, K = 4096, 256, 4
DOMAINS = Domains(("a", "b", "c", "d"))


class Alone:
    """An accelerator of one process without autocast, on any device."""

    num_processes, process_index = 1, 0

    def __init__(self, device):
        self.device = torch.device(device)

    def reduce(self, tensor, _how):
        return tensor

    def backward(self, loss):
        loss.backward()

    def no_sync(self, _model):
        return contextlib.nullcontext()


def batch_of(num_sequences, seed=0):
    """Packed sequences of two to four documents, with padding."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_sequences):
        lengths = rng.multinomial(T - int(rng.integers(0, 30)), np.ones(3) / 3)
        ids, labels, positions, documents = packed(*lengths.tolist(), total=T)
        drawn = torch.from_numpy(rng.integers(2, VOCAB, ids.shape))
        labels[labels != -100] = drawn.roll(-1, 1)[labels != -100]
        rows.append((drawn, labels, positions, documents.int()))
    ids, labels, positions, documents = (torch.cat(column) for column in zip(*rows, strict=True))
    return {
        "input_ids_BT": ids,
        "labels_BT": labels,
        "position_ids_BT": positions,
        "document_ids_BT": documents,
        "domain_ids_B": torch.arange(num_sequences) % K,
        "reference_loss_BT": torch.from_numpy(rng.uniform(0, 9, ids.shape).astype(np.float32)),
    }


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def tiny(seed=0):
    return build_model("tiny", TokenInfo(VOCAB, 1, 0), T, seed=seed)


def relative(got, expected):
    expected = expected.double().cpu()
    return float((got.double().cpu() - expected).norm() / expected.norm())


# --- the loss ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [BLOCKS, *CUDA_KERNELS])
def test_a_loss_kernel_gives_the_numbers_of_a_cpu(name, dtype):
    candidates = {} if name == BLOCKS else {name: CUDA_KERNELS[name]}
    reason = select_loss_kernel(
        CUDA, dtype, candidates=candidates, num_tokens=1000, hidden_size=128, vocab_size=5000
    ).reason
    if f"; {name}: " in reason:
        assert name not in (BLOCKS, "compiled"), reason
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 500, 128, generator=generator).to(dtype)
    head = torch.randn(5000, 128, generator=generator) * 128**-0.5
    labels = torch.randint(5000, (2, 500), generator=generator)
    labels[:, ::3] = -100
    upstream = torch.rand(2, 500, generator=generator)
    wide = hidden.float().requires_grad_(), head.to(dtype).float().requires_grad_()
    logits = wide[0].flatten(0, 1) @ wide[1].T
    expected = F.cross_entropy(logits, labels.flatten(), reduction="none").view(2, 500)
    expected_gradients = torch.autograd.grad(expected, wide, upstream)
    leaves = hidden.to(CUDA).requires_grad_(), head.to(CUDA).requires_grad_()
    kernel = LossKernel(name, candidates.get(name), "")
    loss = linear_cross_entropy(*leaves, labels.to(CUDA), kernel=kernel)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.cpu(), expected, atol=1e-3)
    for got, wanted in zip(torch.autograd.grad(loss, leaves, upstream.to(CUDA)), expected_gradients, strict=True):
        assert relative(got, wanted) < (1e-4 if dtype == torch.float32 else 2**-8)


def test_the_loss_never_waits_for_the_gpu():
    hidden = torch.randn(1, 300, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(1000, 64, device=CUDA, requires_grad=True)
    labels = torch.randint(1000, (1, 300), device=CUDA)
    index = torch.arange(300, device=CUDA)
    for mode in ("default", "error"):  # the first time may try what the device can do
        torch.cuda.set_sync_debug_mode(mode)
        try:
            linear_cross_entropy(hidden, head, labels, label_index_N=index).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- attention ---


@pytest.mark.parametrize("name", NAMES)
def test_attention_without_the_mask_gives_the_numbers_of_the_mask(name):
    if not has_bf16():
        pytest.skip("needs a GPU with bf16")
    model = tiny().to(CUDA)
    chosen, reason = choose_attention(model, CUDA, torch.bfloat16, [name])
    assert chosen == name, reason
    batch = on(CUDA, batch_of(4))
    results = {}
    for way in ("sdpa", name):
        model.attention = way
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(model, batch)
        results[way] = [loss.detach(), *torch.autograd.grad(loss.sum(), list(model.parameters()))]
    for got, wanted in zip(results[name], results["sdpa"], strict=True):
        assert relative(got, wanted) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_what_another_document_says_changes_no_bit(name):
    kernel = attention.varlen_kernel if name == "varlen" else attention.flex_kernel
    wrap = attention.varlen_attention if name == "varlen" else attention.flex_attention
    attend = wrap(kernel())
    documents = batch_of(3)["document_ids_BT"]
    inputs = attention_inputs(name, documents.to(CUDA), document_starts(documents).to(CUDA))
    tensors = [torch.randn(3, 2, T, 64, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
    others = [torch.where((documents == 0)[:, None, :, None].to(CUDA), t, torch.randn_like(t)) for t in tensors]
    one, other = (attend(None, *heads, **inputs)[0] for heads in (tensors, others))
    first = (documents == 0).to(CUDA)
    assert torch.equal(one[first], other[first])
    expected = F.scaled_dot_product_attention(
        *(heads.float() for heads in tensors), attn_mask=document_mask(documents.to(CUDA))
    ).transpose(1, 2)
    assert relative(one.float(), expected) < 0.01


# --- a step ---


@pytest.mark.parametrize("make", [PlainObjective, lambda: ProxyObjective(DOMAINS, GroupDRO())])
@pytest.mark.parametrize("is_narrow", [False, True])
def test_a_step_is_that_of_a_cpu(make, is_narrow):
    if is_narrow and not has_bf16():
        pytest.skip("needs a GPU with bf16")
    batch = batch_of(8)
    results = []
    for device, narrow in (("cpu", False), ("cuda", is_narrow)):
        model = tiny().to(device)
        if narrow:
            model.attention, _ = choose_attention(model, CUDA, torch.bfloat16)
            assert model.attention != "sdpa"
        objective = make()
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            logged = objective.backward(model, [on(device, batch)], Alone(device))
        results.append([logged, *(parameter.grad for parameter in model.parameters())])
    (expected_log, *expected), (log, *got) = results
    assert relative(log, expected_log) < (1e-3 if is_narrow else 1e-6)
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < (0.05 if is_narrow else 1e-3)


def test_domain_weights_from_the_same_losses_are_the_same():
    rng = torch.Generator().manual_seed(0)
    learner = GroupDRO(step_size=1.0, smoothing=1e-3)
    states = {device: learner.start(K) for device in ("cpu", "cuda")}
    mask = torch.rand(8, 50, generator=rng) < 0.7
    for _ in range(50):
        losses = torch.rand(2, 8, 50, generator=rng) * 5
        for device, state in states.items():
            domain_ids = (torch.arange(8) % K).to(device)
            sums = domain_sums(losses[0].to(device), losses[1].to(device), mask.to(device), domain_ids, K)
            states[device], _ = learner.step(state, sums)
    expected, got = (learner.result(state).cpu() for state in states.values())
    assert expected.dtype == got.dtype == torch.float64
    assert not torch.allclose(expected, torch.full_like(expected, 1 / K), atol=0.01)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_a_step_never_waits_for_the_gpu():
    accelerator = make_accelerator()
    model = tiny()
    prepared = prepare(model, EngineSettings(compile=False), accelerator, batch_of(4), 10, lambda _line: None)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    objective = ProxyObjective(DOMAINS, GroupDRO())
    batches = [to_device(with_host_facts(batch_of(8, seed), model), CUDA) for seed in range(3)]
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            objective.backward(prepared, [batch], accelerator)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_blocks_give_the_numbers_of_plain_ones():
    accelerator, said = make_accelerator(), []
    model = tiny()
    batch = to_device(batch_of(8), CUDA)
    prepared = prepare(model, EngineSettings(compile=True), accelerator, batch_of(8), 10, said.append)
    assert any(line.startswith("  torch.compile is on") for line in said), said
    batch = to_device(with_host_facts(batch_of(8), model), CUDA)
    compiled = forward(prepared, batch).detach()
    undo_compile(model)
    assert relative(compiled, forward(prepared, batch).detach()) < 0.01


# --- adapters ---


@pytest.fixture
def checkpoint(tmp_path):
    save_model(tiny(), tmp_path / "base")
    return str(tmp_path / "base")


def test_checkpointing_drops_again_what_was_dropped(checkpoint):
    settings = LoraSettings(
        rank=4, alpha=8, dropout=0.3, target_modules=("q_proj", "k_proj", "v_proj"), shared_input=("q_proj", "k_proj")
    )
    model = build_model(checkpoint, TokenInfo(VOCAB, 1, 0), T, 0, lora=settings, adapter="one").to(CUDA)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.02)  # the second matrices start at zero
    set_adapter_dropout(model.model, on=True)
    batch = on(CUDA, batch_of(4))
    results = []
    for again in (False, True):
        if again:
            enable_checkpointing(model)
        torch.manual_seed(3)
        loss = forward(model, batch)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), trained)])
    disable_gradient_checkpointing(model)
    set_adapter_dropout(model.model, on=False)
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < 1e-5
    assert relative(forward(model, batch).detach(), results[0][0]) > 1e-5


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_base_in_fewer_bits_is_trained_over(quantization, checkpoint):
    pytest.importorskip("bitsandbytes")
    batch = batch_of(4)
    expected = forward(tiny(), batch).detach()
    model = build_model(
        checkpoint,
        TokenInfo(VOCAB, 1, 0),
        T,
        0,
        lora=LoraSettings(rank=4, alpha=8),
        adapter="one",
        base_dtype=torch.bfloat16,
        quantization=quantization,
    )
    said = []
    accelerator = make_accelerator()
    prepared = prepare(model, EngineSettings(True, compile=False), accelerator, batch, 10, said.append)
    placed = to_device(with_host_facts(batch, model), CUDA)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, fused=True)
    losses = []
    for _ in range(8):
        loss = forward(prepared, placed)
        losses.append(loss.detach())
        loss.sum().div(placed["label_index_N"].numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert relative(losses[0], expected) < 0.03
    assert losses[-1].sum() < losses[0].sum()


# --- the loop ---


def test_a_training_goes_on_where_it_was_killed(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in batch_of(64).items()}
    plan = TrainingPlan("reference", 12, 3e-3, 0.1, 0.01, 1.0, 2, 6, EngineSettings(compile=False))
    schedule = Schedule([np.arange(i, 64, K) for i in range(K)], np.ones(K) / K, 8, 12, seed=0)

    def read(ids, fails_at=None):
        if fails_at is not None and np.array_equal(ids, fails_at):
            raise RuntimeError("killed")
        return {name: torch.from_numpy(array[ids]) for name, array in arrays.items()}

    def run(name, fails_at=None):
        (tmp_path / name).mkdir(exist_ok=True)
        model, objective = tiny(), ProxyObjective(DOMAINS, GroupDRO())
        with Narrator(quiet=True).track("test", None, "tokens") as tracker:
            train(model, objective, schedule, lambda ids: read(ids, fails_at), plan, tmp_path / name, tracker)
        return model, objective

    whole, whole_objective = run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("killed", np.array_split(schedule.batch(8), 2)[0])
    before = read_log(tmp_path / "killed" / "metrics.jsonl")[:6]
    resumed, resumed_objective = run("killed")
    logs = [read_log(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert logs[1][:6] == before
    assert [row["step"] for row in logs[1]] == list(range(1, 13))
    # Sums over atomics come in any order, so the last bits of a GPU are its own.
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=5e-3)
    torch.testing.assert_close(resumed_objective.result(), whole_objective.result(), rtol=0, atol=1e-3)
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert relative(other.detach(), one.detach()) < 0.02, name
