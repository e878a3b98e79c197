"""Linear cross-entropy against the plain path, in value and in both gradients."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from doremi_mix.loss import linear_cross_entropy

WHOLE, CHUNKED = 2**26, 5 * 11  # kept logits: all, or chunks of five tokens at a vocabulary of eleven


def plain(hidden_BTD, head_VD, labels_BT):
    logits_BTV = hidden_BTD @ head_VD.T
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none").view(labels_BT.shape)


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    hidden_BTD = torch.randn(3, 7, 4, dtype=dtype, requires_grad=True)
    head_VD = torch.randn(11, 4, dtype=dtype, requires_grad=True)
    labels_BT = torch.randint(11, (3, 7)).masked_fill(torch.rand(3, 7) < 0.4, -100)
    return hidden_BTD, head_VD, labels_BT


@pytest.mark.parametrize("kept", [WHOLE, CHUNKED, 1])
def test_value_and_gradients_equal_the_plain_path(kept):
    hidden_BTD, head_VD, labels_BT = inputs()
    upstream_BT = torch.randn(3, 7, dtype=torch.float64)
    expected = plain(hidden_BTD, head_VD, labels_BT)
    expected_gradients = torch.autograd.grad(expected, (hidden_BTD, head_VD), upstream_BT)
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, max_kept_logits=kept)
    gradients = torch.autograd.grad(loss_BT, (hidden_BTD, head_VD), upstream_BT)
    assert torch.allclose(loss_BT, expected, atol=1e-12, rtol=0)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kept", [WHOLE, CHUNKED])
def test_gradcheck(kept):
    hidden_BTD, head_VD, labels_BT = inputs()
    torch.autograd.gradcheck(
        lambda hidden, head: linear_cross_entropy(hidden, head, labels_BT, max_kept_logits=kept), (hidden_BTD, head_VD)
    )


@pytest.mark.parametrize("kept", [WHOLE, CHUNKED])
def test_bfloat16_inputs_are_close_to_float64(kept):
    hidden_BTD, head_VD, labels_BT = inputs(torch.bfloat16)
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, max_kept_logits=kept)
    assert loss_BT.dtype == torch.float32
    assert torch.allclose(loss_BT.double(), plain(hidden_BTD.double(), head_VD.double(), labels_BT), atol=0.05)


@pytest.mark.parametrize("kept", [WHOLE, CHUNKED])
def test_ignored_tokens_are_never_read(kept):
    hidden_BTD, head_VD, labels_BT = inputs()
    poisoned = hidden_BTD.detach().masked_fill((labels_BT == -100)[..., None], float("nan")).requires_grad_()
    loss_BT = linear_cross_entropy(poisoned, head_VD, labels_BT, max_kept_logits=kept)
    loss_BT.sum().backward()
    assert torch.isfinite(loss_BT).all()
    assert torch.isfinite(head_VD.grad).all()
    assert (poisoned.grad[labels_BT == -100] == 0).all()


@pytest.mark.parametrize("kept", [WHOLE, 0])
def test_all_ignored(kept):
    hidden_BTD, head_VD, labels_BT = inputs()
    loss_BT = linear_cross_entropy(hidden_BTD, head_VD, torch.full_like(labels_BT, -100), max_kept_logits=kept)
    loss_BT.sum().backward()
    assert (loss_BT == 0).all()
    assert (head_VD.grad == 0).all()


@pytest.mark.parametrize("kept", [WHOLE, CHUNKED])
def test_autocast_uses_one_dtype_in_both_passes(kept):
    hidden_BTD, head_VD, labels_BT = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_BT = linear_cross_entropy(hidden_BTD, head_VD, labels_BT, max_kept_logits=kept)
    loss_BT.sum().backward()
    # The gradient of the loss that was computed: of the inputs rounded to bfloat16.
    rounded = hidden_BTD.detach().bfloat16().double().requires_grad_()
    plain(rounded, head_VD.detach().bfloat16().double(), labels_BT).sum().backward()
    assert loss_BT.dtype == torch.float32
    assert torch.allclose(hidden_BTD.grad.double(), rounded.grad, atol=0.03)
