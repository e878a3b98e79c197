"""Linear cross-entropy against the plain path, in value and in both gradients; its memory; the choice of a kernel."""

import contextlib
import functools
import re
import subprocess
import sys
import time
import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from doremi_mix import loss as loss_module
from doremi_mix import loss_kernels
from doremi_mix.loss import LossKernel, linear_cross_entropy, select_loss_kernel
from doremi_mix.loss_kernels import Passes, blocked_cross_entropy, fold, gradient

PURE = Passes(fold, gradient)


def ours(**options):
    return LossKernel("ours", functools.partial(blocked_cross_entropy, **options), "")


# The problem below has up to 21 tokens and 11 words: five by two blocks of tokens by four of words, all of them with a
# shorter last one.
WAYS = {
    "logits kept": None,
    "logits made again": ours(max_kept_logits=0),
    "blocks kept": ours(block_shape=(5, 3)),
    "blocks made again": ours(block_shape=(5, 3), max_kept_logits=0),
    "blocks of one": ours(block_shape=(1, 1), max_kept_logits=0),
    "pure passes": ours(block_shape=(4, 5), passes=PURE, max_kept_logits=0),
    "pure passes over kept blocks": ours(block_shape=(4, 5), passes=PURE),
}
in_every_way = pytest.mark.parametrize("kernel", WAYS.values(), ids=WAYS)


def plain(hidden_BTD, head_VD, labels_BT):
    logits_BTV = hidden_BTD @ head_VD.T
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none").view(labels_BT.shape)


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    hidden_BTD = torch.randn(3, 7, 4, dtype=dtype, requires_grad=True)
    head_VD = torch.randn(11, 4, dtype=dtype, requires_grad=True)
    labels_BT = torch.randint(11, (3, 7)).masked_fill(torch.rand(3, 7) < 0.4, -100)
    return hidden_BTD, head_VD, labels_BT


def positions(labels_BT):
    return (labels_BT != -100).flatten().nonzero().squeeze(1)


# --- exactness ---


@in_every_way
def test_value_and_gradients_equal_the_plain_path(kernel):
    hidden_BTD, head_VD, labels_BT = inputs()
    upstream_BT = torch.randn(3, 7, dtype=torch.float64)  # some negative: any weights may come
    expected = plain(hidden_BTD, head_VD, labels_BT)
    expected_gradients = torch.autograd.grad(expected, (hidden_BTD, head_VD), upstream_BT)
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=kernel)
    gradients = torch.autograd.grad(loss_BT, (hidden_BTD, head_VD), upstream_BT)
    assert torch.allclose(loss_BT, expected, atol=1e-12, rtol=0)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "blocks of one"])
def test_gradcheck(way):
    hidden_BTD, head_VD, labels_BT = inputs()
    torch.autograd.gradcheck(
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_BT, kernel=WAYS[way]), (hidden_BTD, head_VD)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 5), st.integers(1, 9), st.integers(1, 10), st.integers(1, 10), st.booleans(),
    st.booleans(), st.floats(0, 1), st.integers(0, 10**6),
)  # fmt: skip
def test_any_shape_in_any_blocks(num_tokens, D, V, tokens, words, keep, is_pure, ignored, seed):
    torch.manual_seed(seed)
    hidden_BTD = torch.randn(1, num_tokens, D, dtype=torch.float64, requires_grad=True)
    head_VD = (3 * torch.randn(V, D, dtype=torch.float64)).requires_grad_()
    labels_BT = torch.randint(V, (1, num_tokens)).masked_fill(torch.rand(1, num_tokens) < ignored, -100)
    upstream_BT = torch.randn(1, num_tokens, dtype=torch.float64)
    passes = PURE if is_pure else loss_kernels.IN_PLACE
    kernel = ours(block_shape=(tokens, words), max_kept_logits=100 * keep, passes=passes)
    expected = plain(hidden_BTD, head_VD, labels_BT)
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=kernel)
    assert torch.allclose(loss_BT, expected, atol=1e-10, rtol=1e-10)
    got = torch.autograd.grad(loss_BT, (hidden_BTD, head_VD), upstream_BT)
    for one, wanted in zip(got, torch.autograd.grad(expected, (hidden_BTD, head_VD), upstream_BT), strict=True):
        assert torch.allclose(one, wanted, atol=1e-10, rtol=1e-10)


def test_logits_far_apart_neither_overflow_nor_lose_the_smaller_loss():
    # exp(1000) is infinite; the best word comes in the first, a middle and the last block in turn.
    head_VD = torch.eye(9, requires_grad=True)
    hidden_BTD = (1000 * torch.eye(9)[None, [0, 4, 8]]).requires_grad_()
    labels_BT = torch.tensor([[0, 4, 1]])
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=WAYS["blocks made again"])
    loss_BT.sum().backward()
    assert loss_BT.tolist() == [[0.0, 0.0, 1000.0]]
    assert torch.isfinite(head_VD.grad).all()


@in_every_way
def test_tied_weights_get_both_gradients(kernel):
    _, head_VD, labels_BT = inputs()
    ids_BT = labels_BT.roll(1, dims=1).clamp(min=0)
    upstream_BT = torch.randn(3, 7, dtype=torch.float64)
    expected = torch.autograd.grad(plain(head_VD[ids_BT], head_VD, labels_BT), head_VD, upstream_BT)
    loss_BT = linear_cross_entropy(head_VD[ids_BT], head_VD, labels_BT, kernel=kernel)
    got = torch.autograd.grad(loss_BT, head_VD, upstream_BT)
    assert torch.allclose(got[0], expected[0], atol=1e-12, rtol=0)


@in_every_way
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_changes_nothing_of_the_other(kernel, frozen):
    hidden_BTD, head_VD, labels_BT = inputs()
    plain(hidden_BTD, head_VD, labels_BT).sum().backward()
    expected = (hidden_BTD if frozen == "head" else head_VD).grad
    hidden_BTD, head_VD, _ = inputs()
    (hidden_BTD if frozen == "hidden" else head_VD).requires_grad_(False)
    linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=kernel).sum().backward()
    free, still = (hidden_BTD, head_VD) if frozen == "head" else (head_VD, hidden_BTD)
    assert torch.allclose(free.grad, expected, atol=1e-12, rtol=0)
    assert still.grad is None


@in_every_way
def test_the_gradient_can_be_taken_twice(kernel):
    hidden_BTD, head_VD, labels_BT = inputs()
    loss = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=kernel).sum()
    first = torch.autograd.grad(loss, (hidden_BTD, head_VD), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden_BTD, head_VD))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    hidden_BTD, head_VD, labels_BT = inputs()
    loss = linear_cross_entropy(hidden_BTD, head_VD, labels_BT).sum()
    with pytest.raises(RuntimeError, match="support automatic differentiation"):
        torch.autograd.grad(loss, (hidden_BTD, head_VD), create_graph=True)


# --- narrow types ---


@in_every_way
def test_bfloat16_inputs_are_summed_in_float32(kernel):
    """Products of bfloat16 numbers are exact in float32, so losses are as good as from float32 inputs.

    Each gradient is a sum in float32 rounded to bfloat16 once: by half of its last place, 2**-8 of it, at most.
    """
    hidden_BTD, head_VD, labels_BT = inputs(torch.bfloat16)
    upstream_BT = torch.randn(3, 7)
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=kernel)
    gradients = torch.autograd.grad(loss_BT, (hidden_BTD, head_VD), upstream_BT)
    wide = [one.detach().double().requires_grad_() for one in (hidden_BTD, head_VD)]
    expected_BT = plain(*wide, labels_BT)
    assert loss_BT.dtype == torch.float32
    assert torch.allclose(loss_BT.double(), expected_BT, atol=1e-5, rtol=0)
    for got, wanted in zip(gradients, torch.autograd.grad(expected_BT, wide, upstream_BT.double()), strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.double(), wanted, atol=1e-6, rtol=2**-8)


@in_every_way
def test_autocast_rounds_once_and_leaves_the_gradient_of_the_head_wide(kernel):
    hidden_BTD, head_VD, labels_BT = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=kernel)
        loss_BT.sum().backward()  # under autocast, too, which must not reach the backward pass
    # The gradient of the loss that was computed: of the inputs rounded to bfloat16.
    hidden, head = (one.detach().bfloat16().double().requires_grad_() for one in (hidden_BTD, head_VD))
    expected_BT = plain(hidden, head, labels_BT)
    expected_BT.sum().backward()
    assert loss_BT.dtype == torch.float32
    assert torch.allclose(loss_BT.double(), expected_BT, atol=1e-5, rtol=0)
    # The hidden states were rounded outside of the kernel, and so is their gradient.
    assert torch.allclose(hidden_BTD.grad.double(), hidden.grad, atol=1e-6, rtol=2**-8)
    assert torch.allclose(head_VD.grad.double(), head.grad, atol=1e-5, rtol=0)
    assert not torch.equal(head_VD.grad, head_VD.grad.bfloat16().float())


def test_blocks_see_no_autocast():
    """Or passes would be compiled once more for each state of it, and products might be rounded a second time."""
    seen = []
    spies = Passes(
        lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or fold(*given),
        lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or gradient(*given),
    )
    hidden_BTD, head_VD, labels_BT = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=ours(passes=spies)).sum().backward()
    assert seen == [False, False]


@pytest.fixture
def narrow_products(monkeypatch):
    """Makes a CPU multiply narrow matrices into float32 ones, as CUDA does: each product exact, sums in float32."""

    def multiply(left, right, out, *, add):
        assert left.dtype == right.dtype == torch.bfloat16
        product = left.float() @ right.float()
        out.copy_(out + product if add else product)

    monkeypatch.setattr(loss_kernels, "multiplies_into_float32", lambda device, dtype, add=False: True)
    monkeypatch.setattr(loss_kernels, "_multiply_mixed", multiply)


@pytest.mark.parametrize("options", [{}, {"block_shape": (70, 90)}, {"passes": PURE, "max_kept_logits": 0}])
def test_products_of_narrow_matrices_as_on_cuda_are_exact_enough(narrow_products, options):
    """Only the gradient of the logits is rounded to bfloat16, and the result: what ``select_loss_kernel`` allows."""
    problem = loss_module._make_problem(torch.device("cpu"), torch.bfloat16, loss_module._Size(300, 32, 500))
    assert loss_module._what_is_wrong(problem, ours(**options)) is None


# --- ignored tokens ---


@in_every_way
@pytest.mark.parametrize("is_given", [False, True])
def test_ignored_tokens_are_never_read(kernel, is_given):
    hidden_BTD, head_VD, labels_BT = inputs()
    poisoned = hidden_BTD.detach().masked_fill((labels_BT == -100)[..., None], float("nan")).requires_grad_()
    index_N = positions(labels_BT) if is_given else None
    loss_BT = linear_cross_entropy(poisoned, head_VD, labels_BT, label_index_N=index_N, kernel=kernel)
    loss_BT.sum().backward()
    assert torch.isfinite(loss_BT).all()
    assert torch.isfinite(head_VD.grad).all()
    assert (poisoned.grad[labels_BT == -100] == 0).all()


@in_every_way
def test_a_padded_index_gives_the_same_and_nothing_for_its_padding(kernel):
    hidden_BTD, head_VD, labels_BT = inputs()
    upstream_BT = torch.randn(3, 7, dtype=torch.float64)
    expected = plain(hidden_BTD, head_VD, labels_BT)
    expected_gradients = torch.autograd.grad(expected, (hidden_BTD, head_VD), upstream_BT)
    ignored = (labels_BT == -100).flatten().nonzero().squeeze(1)
    poisoned = hidden_BTD.detach().masked_fill((labels_BT == -100)[..., None], float("nan")).requires_grad_()
    index_N = torch.cat([ignored[:2], positions(labels_BT).flip(0), ignored[:1].expand(6)])  # in any order
    loss_BT = linear_cross_entropy(poisoned, head_VD, labels_BT, label_index_N=index_N, kernel=kernel)
    gradients = torch.autograd.grad(loss_BT, (poisoned, head_VD), upstream_BT)
    assert torch.allclose(loss_BT, expected, atol=1e-12, rtol=0)
    assert (loss_BT[labels_BT == -100] == 0).all()
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(got, wanted, atol=1e-12, rtol=0)


@in_every_way
@pytest.mark.parametrize("index_N", [None, torch.tensor([3, 3]), torch.tensor([], dtype=torch.int64)])
def test_all_ignored(kernel, index_N):
    hidden_BTD, head_VD, labels_BT = inputs()
    labels_BT = torch.full_like(labels_BT, -100)
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, label_index_N=index_N, kernel=kernel)
    loss_BT.sum().backward()
    assert (loss_BT == 0).all()
    assert (head_VD.grad == 0).all()
    assert (hidden_BTD.grad == 0).all()


@in_every_way
def test_no_sequences(kernel):
    hidden_BTD, head_VD, labels_BT = inputs()
    loss_BT = linear_cross_entropy(hidden_BTD[:0], head_VD, labels_BT[:0], kernel=kernel)
    loss_BT.sum().backward()
    assert loss_BT.shape == (0, 7)
    assert (head_VD.grad == 0).all()


def test_another_label_can_be_the_ignored_one():
    hidden_BTD, head_VD, labels_BT = inputs()
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT.clamp(min=0), 0)
    assert ((loss_BT == 0) == (labels_BT <= 0)).all()


@pytest.mark.parametrize("wrong", [11, -1])
def test_a_label_that_the_head_has_no_row_for_is_refused(wrong):
    hidden_BTD, head_VD, labels_BT = inputs()
    labels_BT[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"^label {wrong} is none of the head's 11 rows$"):
        linear_cross_entropy(hidden_BTD, head_VD, labels_BT)
    # Where asking would make the host wait, it shows in the loss.
    labels_N = torch.tensor([3, wrong])
    assert blocked_cross_entropy(hidden_BTD[0, :2], head_VD, labels_N).isnan().tolist() == [False, True]


# --- memory ---


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors that are alive at once, of those that are made while it is active."""

    def __init__(self, *inputs):
        super().__init__()
        self.sizes = {one.untyped_storage()._cdata: 0 for one in inputs}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key):
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize(("num_tokens", "share"), [(2048, 3), (8192, 8)])
def test_memory_on_a_cpu_at_a_large_vocabulary(num_tokens, share):
    """Beyond the two gradients, less than a third (at 8,192 tokens an eighth) of what the logits alone would take."""
    D, V = 256, 125_696
    with FakeTensorMode():  # shapes, but no numbers: nothing is computed
        hidden_ND = torch.empty(num_tokens, D, requires_grad=True)
        head_VD = torch.empty(V, D, requires_grad=True)
        labels_N, upstream_N = torch.empty(num_tokens, dtype=torch.int64), torch.empty(num_tokens)
        given = hidden_ND, head_VD, labels_N, upstream_N
        with LiveBytes(*given) as memory:
            blocked_cross_entropy(hidden_ND, head_VD, labels_N).backward(upstream_N)
        gradients = hidden_ND.grad.nbytes + head_VD.grad.nbytes
        hidden_ND.grad = head_VD.grad = None
        with LiveBytes(*given) as memory_of_plain:
            plain(hidden_ND[None], head_VD, labels_N[None]).backward(upstream_N[None])
    logits = num_tokens * V * 4
    assert memory_of_plain.peak > 2 * logits + gradients  # the measure sees what there is
    assert memory.peak < memory_of_plain.peak / share
    assert memory.peak - gradients < logits / share
    # One block at a time, and what has the size of the hidden states.
    assert memory.peak - gradients < 2**25 + 3 * hidden_ND.nbytes


@pytest.fixture
def meta_is_a_gpu(monkeypatch):
    """Lets the device "meta" (shapes, no numbers; whoever asks it for a number fails) stand in for CUDA."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    monkeypatch.setattr(loss_kernels, "multiplies_into_float32", lambda device, dtype, add=False: True)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [768, 1024])
def test_memory_on_a_gpu_is_under_one_gib_with_gradients_and_no_step_waits(meta_is_a_gpu, D, head_dtype):
    B, T, V = 16, 1024, 125_696
    hidden_BTD = torch.empty(B, T, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    head_VD = torch.empty(V, D, dtype=head_dtype, device="meta", requires_grad=True)
    labels_BT = torch.empty(B, T, dtype=torch.int64, device="meta")
    index_N = torch.empty(B * T, dtype=torch.int64, device="meta")
    upstream_BT = torch.empty(B, T, device="meta")
    with LiveBytes(hidden_BTD, head_VD, labels_BT, index_N, upstream_BT) as memory:
        loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, label_index_N=index_N)
        loss_BT.backward(upstream_BT)
    assert loss_BT.dtype == torch.float32
    assert head_VD.grad.dtype == head_dtype
    assert memory.peak < 2**30
    assert memory.peak > head_VD.grad.nbytes + hidden_BTD.grad.nbytes + 2**25 * 6  # with a block and its gradient
    # Without the index the host would have to know how many labels count.
    with pytest.raises(NotImplementedError, match="nonzero"):
        linear_cross_entropy(hidden_BTD, head_VD, labels_BT)


@pytest.mark.parametrize("is_trained", [True, False])
def test_logits_are_kept_for_a_gradient_only(is_trained):
    hidden_ND = torch.randn(100, 8, requires_grad=is_trained)
    head_VD, labels_N = torch.randn(900, 8), torch.randint(900, (100,))
    given = hidden_ND, head_VD, labels_N
    with LiveBytes(*given) as memory:
        loss_N = blocked_cross_entropy(*given, block_shape=(10, 90))
    assert (memory.now >= 100 * 900 * 4) is is_trained
    with torch.no_grad(), LiveBytes(*given) as memory:
        assert torch.equal(blocked_cross_entropy(*given, block_shape=(10, 90)), loss_N)
    assert memory.peak < 100 * 900
    with LiveBytes(*given) as memory:
        blocked_cross_entropy(*given, block_shape=(10, 90), max_kept_logits=100 * 900 - 1)
    assert memory.peak < 100 * 900


# --- the choice of a kernel ---

CPU = torch.device("cpu")
SMALL = {"num_tokens": 200, "hidden_size": 16, "vocab_size": 300}


def full_logits(hidden_ND, head_VD, labels_N):
    """A kernel that is right."""
    return F.cross_entropy(hidden_ND.float() @ head_VD.to(hidden_ND.dtype).float().T, labels_N, reduction="none")


class MeanGradient(torch.autograd.Function):
    """A kernel with the gradient of the mean, whatever the upstream gradients are."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, labels_N):
        with torch.enable_grad():
            leaves = [hidden_ND.detach().requires_grad_(), head_VD.detach().requires_grad_()]
            loss_N = full_logits(*leaves, labels_N)
            ctx.gradients = torch.autograd.grad(loss_N.mean(), leaves)
        return loss_N.detach()

    @staticmethod
    def backward(ctx, upstream_N):
        return *(upstream_N.sum() * gradient for gradient in ctx.gradients), None


def rounded_logits(hidden_ND, head_VD, labels_N):
    logits_NV = hidden_ND @ head_VD.to(hidden_ND.dtype).T
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")


def blind_to_the_rarest_word(hidden_ND, head_VD, labels_N):
    """A kernel that leaves out the gradient of the word that nowhere is likely."""
    rarest = (hidden_ND @ head_VD.T).detach().amax(dim=0).argmin()
    others_V1 = torch.ones(len(head_VD), 1).index_fill(0, rarest, 0.0)
    return full_logits(hidden_ND, head_VD * others_V1 + (head_VD * (1 - others_V1)).detach(), labels_N)


def not_a_number(hidden_ND, head_VD, labels_N):
    return full_logits(hidden_ND, head_VD, labels_N) * float("nan")


def no_image(hidden_ND, head_VD, labels_N):
    raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA.")


def not_there(hidden_ND, head_VD, labels_N):
    import a_package_that_nobody_has  # noqa: F401


@pytest.fixture
def times(monkeypatch):
    """Lets the test say how long each kernel takes."""
    milliseconds = {"blocks": 3.0}
    monkeypatch.setattr(
        loss_module, "_cost", lambda problem, kernel: loss_module._Cost(milliseconds[kernel.name] / 1e3, 2**29)
    )
    return milliseconds


def select(dtype=torch.float32, **candidates):
    return select_loss_kernel(CPU, dtype, candidates=candidates, **SMALL)


def test_a_cpu_takes_our_own_at_once(monkeypatch):
    monkeypatch.setattr(loss_module, "_make_problem", None)  # nothing is tried
    assert select_loss_kernel(CPU, torch.bfloat16) == LossKernel("blocks", None, "loss kernel: blocks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_that_is_right_is_taken(times, dtype):
    times.update(slow=4.0, fast=2.0)
    assert select(dtype, slow=full_logits, fast=full_logits) == LossKernel(
        "fast",
        full_logits,
        "loss kernel: fast (blocks 3.0 ms and 0.50 GiB, slow 4.0 ms and 0.50 GiB, fast 2.0 ms and 0.50 GiB "
        "for 200 tokens)",
    )


def test_our_own_is_taken_where_it_is_the_fastest(times):
    times.update(slow=4.0)
    kernel = select(slow=full_logits)
    assert kernel.name == "blocks"
    assert kernel.function is None


def test_time_is_measured():
    def slow(hidden_ND, head_VD, labels_N):
        time.sleep(0.2)
        return full_logits(hidden_ND, head_VD, labels_N)

    name, _, reason = select(slow=slow)
    assert name == "blocks"
    assert float(reason.partition("slow ")[2].partition(" ms")[0]) >= 200


@pytest.mark.parametrize(
    ("dtype", "function", "reason"),
    [
        (
            torch.float32,
            MeanGradient.apply,
            "gradient of the hidden states off by # of itself, at most 0.0039 is right",
        ),
        (torch.bfloat16, rounded_logits, "losses off by up to # nats, at most 0.001 is right"),
        (torch.float32, blind_to_the_rarest_word, "gradient of a row of the head off by #, at most 0.016 is right"),
        (torch.bfloat16, lambda *given: full_logits(*given).bfloat16(), "losses come as bfloat16"),
        (torch.float32, not_a_number, "losses off by up to nan nats, at most 0.001 is right"),
        (torch.float32, no_image, "failed (RuntimeError: CUDA error: no kernel image is available)"),
        (torch.float32, not_there, "not installed (no module a_package_that_nobody_has)"),
    ],
    ids=["one gradient for all", "rounded logits", "rarest word", "rounded losses", "nan", "raises", "absent"],
)
def test_a_kernel_that_is_wrong_is_not_taken(times, dtype, function, reason):
    kernel = select(dtype, odd=function)
    assert kernel.name == "blocks"
    assert kernel.function is None
    own = "loss kernel: blocks (blocks 3.0 ms and 0.50 GiB for 200 tokens); "
    assert re.sub(r"(by|to) [0-9][0-9.e-]*", r"\1 #", kernel.reason) == f"{own}odd: {reason}"


def test_every_failure_is_named(times):
    times.update(good=1.0)
    assert select(absent=not_there, good=full_logits, broken=no_image).reason == (
        "loss kernel: good (blocks 3.0 ms and 0.50 GiB, good 1.0 ms and 0.50 GiB for 200 tokens); "
        "absent: not installed (no module a_package_that_nobody_has); "
        "broken: failed (RuntimeError: CUDA error: no kernel image is available)"
    )


def test_a_full_device_gets_our_own(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loss_module, "_make_problem", full)
    monkeypatch.setattr(loss_module, "_select_for_cuda", loss_module._select_for_cuda.__wrapped__)
    assert select_loss_kernel(torch.device("cuda"), torch.bfloat16) == LossKernel(
        "blocks",
        None,
        "loss kernel: blocks; too little memory is free to try the others "
        "(compiled, cut-cross-entropy, liger-kernel, torch)",
    )


def test_the_chosen_kernel_sees_only_tokens_that_count_or_pad():
    hidden_BTD, head_VD, labels_BT = inputs()
    seen = []

    def spy(hidden_ND, head_VD, labels_N):
        seen.append((hidden_ND.detach(), labels_N))
        return full_logits(hidden_ND, head_VD, labels_N)

    index_N = torch.cat([positions(labels_BT), (labels_BT == -100).flatten().nonzero()[0]])
    linear_cross_entropy(hidden_BTD, head_VD, labels_BT, label_index_N=index_N, kernel=LossKernel("spy", spy, ""))
    linear_cross_entropy(hidden_BTD, head_VD, labels_BT, kernel=LossKernel("spy", spy, ""))
    (padded, padded_labels), (_, labels_N) = seen
    assert (padded[-1] == 0).all()
    assert padded_labels[-1] == 0
    assert labels_N.tolist() == labels_BT[labels_BT != -100].tolist()


def test_importing_loads_no_kernel():
    code = (
        "import sys, doremi_mix.loss; print(sorted({'triton', 'liger_kernel', 'cut_cross_entropy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
