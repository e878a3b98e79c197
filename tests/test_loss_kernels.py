"""The kernels that others make, called as their packages want; ours with its passes compiled."""

import functools
import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from doremi_mix import loss_kernels
from doremi_mix.loss import select_loss_kernel
from doremi_mix.loss_kernels import (
    CUDA_KERNELS,
    blocked_cross_entropy,
    compiled,
    cut_cross_entropy,
    liger_kernel,
    multiplies_into_float32,
    torch_chunked,
)


def inputs(dtype=torch.bfloat16):
    torch.manual_seed(0)
    hidden_ND = torch.randn(6, 4).to(dtype).requires_grad_()
    return hidden_ND, torch.randn(9, 4, requires_grad=True), torch.randint(9, (6,))


@pytest.fixture
def install(monkeypatch):
    """Puts a module of the given functions where a package would be."""

    def put(name, **functions):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = types.ModuleType(".".join(parts[:end]))
            package.__path__ = []
            monkeypatch.setitem(sys.modules, package.__name__, package)
        for attribute, function in functions.items():
            setattr(package, attribute, function)

    return put


def test_a_newer_cut_cross_entropy_filters_nothing_and_sums_in_float32(install):
    seen = {}

    def linear_cross_entropy(
        e, c, targets, reduction="mean", filter_eps="auto", accum_e_fp32=False, accum_c_fp32=False
    ):
        seen.update(e=e, c=c, targets=targets, settings=(reduction, filter_eps, accum_e_fp32, accum_c_fp32))
        return torch.zeros(6)

    install("cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    hidden_ND, head_VD, labels_N = inputs()
    assert cut_cross_entropy(hidden_ND, head_VD, labels_N).shape == (6,)
    assert seen["e"] is hidden_ND
    assert seen["c"].dtype == torch.bfloat16
    assert torch.equal(seen["c"], head_VD.bfloat16())
    assert seen["targets"] is labels_N
    assert seen["settings"] == ("none", None, True, True)


def test_an_older_cut_cross_entropy_is_not_told_what_it_does_not_know(install):
    seen = {}

    def linear_cross_entropy(e, c, targets, reduction="mean", filter_eps="high"):
        seen.update(reduction=reduction, filter_eps=filter_eps)
        return torch.zeros(6)

    install("cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    cut_cross_entropy(*inputs())
    assert seen == {"reduction": "none", "filter_eps": None}


def test_liger_kernel_sums_the_gradient_of_the_head_in_float32(install):
    seen = {}

    def liger_fused_linear_cross_entropy(input, weight, target, *, reduction, accum_dtype):  # noqa: A002
        seen.update(input=input, weight=weight, target=target, settings=(reduction, accum_dtype))
        return torch.zeros(6)

    install("liger_kernel.transformers.functional", liger_fused_linear_cross_entropy=liger_fused_linear_cross_entropy)
    hidden_ND, head_VD, labels_N = inputs()
    assert liger_kernel(hidden_ND, head_VD, labels_N).shape == (6,)
    assert seen["input"] is hidden_ND
    assert torch.equal(seen["weight"], head_VD.bfloat16())
    assert seen["target"] is labels_N
    assert seen["settings"] == ("none", torch.float32)


@pytest.mark.parametrize("name", ["cut-cross-entropy", "liger-kernel"])
def test_a_package_that_is_not_installed_is_said_to_be(monkeypatch, name):
    module = name.replace("-", "_")
    monkeypatch.setattr(importlib, "import_module", functools.partial(_not_found, module))
    kernel = select_loss_kernel(
        torch.device("cpu"),
        torch.bfloat16,
        candidates={name: CUDA_KERNELS[name]},
        num_tokens=20,
        hidden_size=4,
        vocab_size=9,
    )
    assert kernel.function is None
    assert kernel.reason.partition("; ")[2] == f"{name}: not installed (no module {module})"


def _not_found(module, name):
    assert name.partition(".")[0] == module
    raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def test_torchs_own_is_right_in_float32():
    hidden_ND, head_VD, labels_N = inputs(torch.float32)
    upstream_N = torch.randn(6)
    expected = F.cross_entropy(hidden_ND @ head_VD.T, labels_N, reduction="none")
    loss_N = torch_chunked(hidden_ND, head_VD, labels_N)
    assert torch.allclose(loss_N, expected, atol=1e-5)
    gradients = torch.autograd.grad(loss_N, (hidden_ND, head_VD), upstream_N)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, (hidden_ND, head_VD), upstream_N), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


def test_torchs_own_is_not_taken_in_bfloat16():
    """Its losses are rounded to 2**-9 of themselves, 0.02 nats: more than many an excess loss."""
    kernel = select_loss_kernel(
        torch.device("cpu"),
        torch.bfloat16,
        candidates={"torch": torch_chunked},
        num_tokens=20,
        hidden_size=4,
        vocab_size=9,
    )
    assert kernel.function is None
    assert kernel.reason.partition("; ")[2] == "torch: losses come as bfloat16"


def test_an_older_torch_says_what_is_needed(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(ImportError, match=r"^torch 2\.13 or newer is needed$"):
        torch_chunked(*inputs())


def test_the_compiled_passes_are_compiled_once_for_blocks_of_all_sizes(monkeypatch):
    """The number of tokens is another one in each step; torch gives up on what it has compiled eight times."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()  # compiles nothing, but traces, and says how often it was asked to
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    passes = loss_kernels._compiled_passes.__wrapped__()
    for num_tokens in (40, 57, 35):
        for max_kept_logits in (0, 10**6):
            hidden_ND = torch.randn(num_tokens, 4, requires_grad=True)
            head_VD = torch.randn(101, 4, requires_grad=True)
            labels_N, upstream_N = torch.randint(101, (num_tokens,)), torch.randn(num_tokens)
            loss_N = blocked_cross_entropy(
                hidden_ND, head_VD, labels_N, block_shape=(16, 40), max_kept_logits=max_kept_logits, passes=passes
            )
            expected_N = F.cross_entropy(hidden_ND @ head_VD.T, labels_N, reduction="none")
            assert torch.allclose(loss_N, expected_N, atol=1e-5)
            expected = torch.autograd.grad(expected_N, (hidden_ND, head_VD), upstream_N)
            for got, wanted in zip(
                torch.autograd.grad(loss_N, (hidden_ND, head_VD), upstream_N), expected, strict=True
            ):
                assert torch.allclose(got, wanted, atol=1e-5)
    assert counter.frame_count == 2  # one for each pass


def test_the_compiled_kernel_is_ours_with_compiled_passes(monkeypatch):
    called = []
    passes = loss_kernels.Passes(
        lambda *given: called.append("fold") or loss_kernels.fold(*given),
        lambda *given: called.append("gradient") or loss_kernels.gradient(*given),
    )
    monkeypatch.setattr(loss_kernels, "_compiled_passes", lambda: passes)
    compiled(*inputs()).sum().backward()
    assert called == ["fold", "gradient"]


def test_a_cpu_multiplies_narrow_matrices_into_narrow_ones_only():
    for add in (False, True):
        assert not multiplies_into_float32(torch.device("cpu"), torch.bfloat16, add=add)


def test_a_device_is_believed_only_if_its_numbers_are_right(monkeypatch):
    def multiply(left, right, *, out_dtype, out):
        return out.copy_(left.float() @ right.float())

    def add(into, left, right, *, out_dtype, out):
        return out.copy_(left.float() @ right.float())  # forgets to add

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(torch, "addmm", add)
    asks = multiplies_into_float32.__wrapped__
    assert asks(torch.device("cpu"), torch.bfloat16)
    assert not asks(torch.device("cpu"), torch.bfloat16, add=True)


@pytest.mark.parametrize("adds", [True, False])
def test_what_a_device_cannot_add_in_place_is_added_by_itself(monkeypatch, adds):
    calls = []

    def mm(left, right, *, out_dtype, out=None):
        calls.append("mm")
        product = left.float().matmul(right.float())
        return product if out is None else out.copy_(product)

    def addmm(into, left, right, *, out_dtype, out):
        calls.append("addmm")
        assert into is out
        return out.add_(left.float().matmul(right.float()))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(loss_kernels, "multiplies_into_float32", lambda device, dtype, add=False: adds or not add)
    left, right = torch.randn(2, 3).bfloat16(), torch.randn(3, 4).bfloat16()
    out = torch.full((2, 4), 5.0)
    loss_kernels._multiply(left, right, out)
    loss_kernels._multiply(left, right, out, add=True)
    assert torch.allclose(out, 2 * left.float().matmul(right.float()))
    assert calls == ["mm", "addmm" if adds else "mm"]


@pytest.mark.parametrize(
    ("device", "num_tokens", "shape"),
    [
        ("cpu", 5000, (2048, 3584)),
        ("cpu", 16, (16, 458_752)),  # few tokens, more words: no more operations than needed
        ("cpu", 0, (1, 7 * 2**20)),
        ("meta", 16_384, (8192, 4096)),
        ("meta", 2048, (2048, 16_384)),
    ],
)
def test_blocks_fit_the_device(device, num_tokens, shape):
    assert loss_kernels._block_shape(num_tokens, torch.device(device)) == shape
