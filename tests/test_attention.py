"""Every way to keep documents apart gives the numbers of the mask, or is not taken."""

import inspect
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from test_models import packed, small_model

from doremi_mix import attention
from doremi_mix.attention import (
    attention_inputs,
    block_mask,
    choose_attention,
    document_mask,
    document_starts,
    flex_attention,
    varlen_attention,
)
from doremi_mix.models import TokenLossModel

CPU = torch.device("cpu")


def by_document(query, key, value, starts, scale=None):
    """Causal attention of each document alone, over tokens laid end to end: [tokens, heads, size]."""
    parts = [
        F.scaled_dot_product_attention(
            *(heads[start:end].transpose(0, 1)[None] for heads in (query, key, value)), is_causal=True, scale=scale
        )[0].transpose(0, 1)
        for start, end in itertools.pairwise(starts.tolist())
        if end > start
    ]
    return torch.cat(parts)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    assert query.shape == key.shape
    return by_document(query, key, value, cu_seq_q)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0)
    assert query.shape == key.shape
    return by_document(query, key, value, cu_seq_q, scale)


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        assert groups > 1
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    assert query.shape == key.shape
    return by_document(query, key, value, cu_seq_q, scale)


def flex_by_mask(query, key, value, *, block_mask, scale=None, enable_gqa=False):
    B, _, T, _ = query.shape
    places = torch.meshgrid(torch.arange(B), torch.arange(T), torch.arange(T), indexing="ij")
    may_attend = block_mask.mask_mod(places[0], torch.zeros(()), places[1], places[2])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=may_attend[:, None], scale=scale, enable_gqa=enable_gqa
    )


@pytest.fixture
def kernels(monkeypatch):
    """Puts kernels in the place of torch's, which need CUDA."""

    def put(varlen=varlen_2_13, flex=flex_by_mask):
        monkeypatch.setattr(attention, "varlen_kernel", lambda: varlen)
        monkeypatch.setattr(attention, "flex_kernel", lambda: flex)

    put()
    return put


def batch():
    """Two sequences of several documents, one of them padded."""
    pairs = zip(packed(5, 7, 3), packed(16), strict=True)
    return [torch.cat(pair) for pair in pairs]


def losses_and_gradients(model, *inputs):
    loss = model(*inputs)
    weights = torch.linspace(0.5, 2, loss.numel()).view_as(loss)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), parameters)]


def same(ones, others, atol=1e-6):
    return all(torch.allclose(one, other, atol=atol, rtol=1e-5) for one, other in zip(ones, others, strict=True))


# --- where documents start ---


def test_starts_are_where_the_ids_change_and_sequences_begin():
    ids = np.array([[0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0], [3, 4, 4, 4, 5, 5]])
    starts = document_starts(ids)
    assert starts.tolist() == [0, 2, 5, 6, 12, 13, 16] + [18] * 57
    assert starts.dtype == torch.int32
    assert torch.equal(document_starts(torch.from_numpy(ids)), starts)


@pytest.mark.parametrize(("num_documents", "length"), [(1, 64), (63, 64), (64, 128), (127, 128), (200, 256)])
def test_the_number_of_starts_takes_few_values_and_the_end_is_always_there(num_documents, length):
    starts = document_starts(np.arange(num_documents)[None])
    assert len(starts) == length
    assert starts[: num_documents + 1].tolist() == list(range(num_documents + 1))
    assert (starts[num_documents:] == num_documents).all()


def test_the_block_mask_is_the_mask():
    documents = batch()[3]
    places = torch.meshgrid(torch.arange(2), torch.arange(16), torch.arange(16), indexing="ij")
    blocks = block_mask(documents)
    assert blocks.shape == (2, 1, 16, 16)
    assert torch.equal(blocks.mask_mod(places[0], None, places[1], places[2]), document_mask(documents)[:, 0])


# --- the same numbers ---


@pytest.mark.parametrize("name", ["varlen", "flex"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {}), ("qwen2", {}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True})],
)
def test_losses_and_gradients_are_those_of_the_mask(kernels, name, kind, settings):
    model = TokenLossModel(small_model(kind, **settings))
    inputs = batch()
    expected = losses_and_gradients(model, *inputs)
    model.attention = name
    starts = document_starts(inputs[3])
    found = losses_and_gradients(model, *inputs, None, starts)
    assert same(found, expected)
    assert same(losses_and_gradients(model, *inputs), found, atol=0)  # finds the starts by itself
    model.attention = "sdpa"
    assert same(losses_and_gradients(model, *inputs), expected, atol=0)


@pytest.mark.parametrize("kernel", [varlen_2_10, varlen_2_11, varlen_2_13])
def test_every_signature_that_torch_had_is_served(kernel):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 16, 8, generator=generator) for heads in (4, 2, 2))
    documents = batch()[3]
    inputs = attention_inputs("varlen", documents, None)
    found, _ = varlen_attention(kernel)(None, query, key, value, **inputs, scaling=0.3)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=document_mask(documents), scale=0.3, enable_gqa=True
    )
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


def test_the_installed_torchs_varlen_takes_what_it_is_given():
    """Without CUDA its kernel does not run, but its shapes can be computed, forward and backward."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or newer has it", exc_type=ImportError)
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert {"query", "key", "value", "cu_seq_q", "max_q"} < set(inspect.signature(varlen.varlen_attn).parameters)
    with FakeTensorMode():
        tensors = [torch.empty(2, heads, 16, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
        starts = torch.empty(64, dtype=torch.int32)
        found, _ = varlen_attention(varlen.varlen_attn)(
            None, *tensors, None, scaling=0.3, document_starts_C=starts, position_ids=None
        )
        assert found.shape == (2, 16, 4, 8)
        gradients = torch.autograd.grad(found.sum(), tensors)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_installed_torchs_flex_attention_gives_the_masks_numbers():
    from torch.nn.attention import flex_attention as module

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 16, 8, generator=generator) for heads in (4, 2, 2))
    documents = batch()[3]
    attend = flex_attention(module.flex_attention)
    found, _ = attend(None, query, key, value, **attention_inputs("flex", documents, None), scaling=0.3)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=document_mask(documents), scale=0.3, enable_gqa=True
    )
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


def test_without_a_mask_transformers_builds_none_and_does_not_look_for_borders(kernels, monkeypatch):
    import transformers

    masks = []
    register = attention._register

    def spied(name, attend):
        def spy(module, query, key, value, attention_mask, **options):
            masks.append(attention_mask)
            return attend(module, query, key, value, attention_mask, **options)

        register(name, spy)

    def refuse(*arguments):
        raise AssertionError("the device would be waited for")

    monkeypatch.setattr(attention, "_register", spied)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", refuse)
    for kind in ("llama", "qwen2", "gpt2"):
        model = TokenLossModel(small_model(kind))
        model.attention = "varlen"
        model(*batch(), None, document_starts(batch()[3]))
    assert masks == [None] * 6


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_kernels_get_autocasts_dtype(kernels, name):
    seen = []

    def spy(query, key, value, *starts, **options):
        seen.extend((query.dtype, key.dtype, value.dtype))
        return (
            varlen_2_13(query, key, value, *starts, **options) if starts else flex_by_mask(query, key, value, **options)
        )

    spy.__signature__ = inspect.signature(varlen_2_13)
    kernels(varlen=spy, flex=spy)
    model = TokenLossModel(small_model())
    model.attention = name
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch())
    assert set(seen) == {torch.bfloat16}
    model(*batch())
    assert seen[-1] == torch.float32


def test_unknown_ways_are_refused(kernels):
    model = TokenLossModel(small_model())
    with pytest.raises(ValueError, match=r'^attention "flash" is unknown; expected sdpa, varlen or flex$'):
        model.attention = "flash"
    assert model.attention == "sdpa"


# --- the choice ---


def blind_to_borders(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return by_document(query, key, value, torch.arange(0, len(query) + 1, max_q), scale)


def blind_flex(query, key, value, *, block_mask, scale=None, enable_gqa=False):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa)


def wrong_gradient(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return by_document(query, key.detach() + 0.5 * (key - key.detach()), value, cu_seq_q, scale)


def raising(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nand a long story")


def chosen(model, ways=("varlen", "flex"), dtype=torch.float32):
    before = model.attention, model.model.config._attn_implementation
    result = choose_attention(model, CPU, dtype, ways)
    assert (model.attention, model.model.config._attn_implementation) == before
    return result


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_right_way_is_chosen(kernels, kind, dtype):
    model = TokenLossModel(small_model(kind))
    assert chosen(model, dtype=dtype) == ("varlen", "")
    assert chosen(model, ways=("flex",), dtype=dtype) == ("flex", "")


def test_a_kernel_that_ignores_borders_is_not_taken(kernels):
    model = TokenLossModel(small_model("qwen2"))
    for dtype, allowed in ((torch.float32, "0.2%"), (torch.bfloat16, "3.1%")):
        kernels(varlen=blind_to_borders)
        name, reason = chosen(model, dtype=dtype)
        assert name == "flex"
        wrong = rf"its values differ from SDPA's by \d\d\.\d% \(allowed {re.escape(allowed)}\)"
        assert re.fullmatch(rf"attention: flex_attention; varlen_attn is off: {wrong}", reason), reason
        kernels(varlen=blind_to_borders, flex=blind_flex)
        name, reason = chosen(model, dtype=dtype)
        assert name == "sdpa"
        assert re.fullmatch(
            rf"attention: SDPA with a mask; varlen_attn is off: {wrong}; flex_attention is off: {wrong}", reason
        ), reason


def test_a_kernel_with_a_wrong_gradient_is_not_taken(kernels):
    kernels(varlen=wrong_gradient)
    name, reason = chosen(TokenLossModel(small_model()))
    assert name == "flex"
    assert "varlen_attn is off: its gradients differ from SDPA's by 50.0% (allowed 0.2%)" in reason


def test_a_kernel_that_fails_or_is_missing_is_not_taken(kernels, monkeypatch):
    model = TokenLossModel(small_model())
    kernels(varlen=raising)
    assert chosen(model, ways=("varlen",)) == (
        "sdpa",
        "attention: SDPA with a mask; varlen_attn is off: FlashAttention only supports Ampere GPUs or newer",
    )

    def missing():
        raise ValueError("torch 2.6.0 has none")

    monkeypatch.setattr(attention, "varlen_kernel", missing)
    assert chosen(model) == ("flex", "attention: flex_attention; varlen_attn is off: torch 2.6.0 has none")


def test_models_that_need_the_mask_keep_it(kernels):
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "pad_token_id": 0}
    bloom = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("bloom", **sizes, n_head=2, n_layer=1)
    ).eval()
    assert chosen(TokenLossModel(bloom), ways=("varlen",)) == (
        "sdpa",
        "attention: SDPA with a mask; varlen_attn is off: BloomForCausalLM does not take other attention",
    )
    gemma = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "gemma2", **sizes, intermediate_size=32, num_key_value_heads=1, head_dim=8, attn_logit_softcapping=30.0
        ),
        attn_implementation="eager",
    ).eval()
    assert chosen(TokenLossModel(gemma), ways=("varlen",)) == (
        "sdpa",
        "attention: SDPA with a mask; varlen_attn is off: the model's attention has softcap",
    )


def test_on_the_cpu_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(attention, "varlen_kernel", None)
    model = TokenLossModel(small_model())
    assert choose_attention(model, CPU, torch.float32) == (
        "sdpa",
        "attention: SDPA with a mask; the fast ways need CUDA",
    )
