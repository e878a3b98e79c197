"""Packed documents do not see each other, padding influences nothing, and unfit models are refused."""

import importlib.util
import json

import pytest
import torch
import transformers

from doremi_mix import models
from doremi_mix.attention import document_mask
from doremi_mix.errors import ModelError
from doremi_mix.fitness import check_behavior
from doremi_mix.models import (
    TokenInfo,
    TokenLossModel,
    blocks,
    build_model,
    compile_blocks,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    load_trained,
    num_parameters,
    save_model,
    undo_compile,
)
from doremi_mix.presets import PRESETS, is_config_only

TOKENS = TokenInfo(vocab_size=50, end_id=1, pad_id=0)


def small_model(kind="llama", **settings):
    torch.manual_seed(0)
    sizes = {
        "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "qwen2": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
        "opt": {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    }
    config = transformers.AutoConfig.for_model(
        kind, **{**sizes[kind], "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1, **settings}
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def packed(*lengths, total=16):
    """One sequence of documents of the given lengths, padded: ids, labels, positions, documents."""
    generator = torch.Generator().manual_seed(1)
    ids, labels, positions, documents = (torch.zeros(1, total, dtype=torch.long) for _ in range(4))
    labels[:], documents[:] = -100, -1
    start = 0
    for number, length in enumerate(lengths):
        part = slice(start, start + length)
        ids[0, part] = torch.randint(2, 50, (length,), generator=generator)
        labels[0, start : start + length - 1] = ids[0, start + 1 : start + length]
        positions[0, part] = torch.arange(length)
        documents[0, part] = number
        start += length
    return ids, labels, positions, documents


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_logits_of_a_packed_document_are_those_of_the_document_alone(kind):
    model = small_model(kind)
    ids, _, positions, documents = packed(5, 7, 3)
    logits = model(input_ids=ids, attention_mask=document_mask(documents), position_ids=positions).logits
    for start, end in ((0, 5), (5, 12), (12, 15)):
        alone = model(input_ids=ids[:, start:end]).logits
        assert torch.allclose(logits[:, start:end], alone, atol=1e-5)


def test_loss_is_the_models_own_cross_entropy():
    model = small_model()
    ids, labels, positions, documents = packed(16)
    loss = TokenLossModel(model)(ids, labels, positions, documents)
    expected = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert torch.allclose(loss[0, :-1], expected, atol=1e-5)
    assert loss[0, -1] == 0


def test_what_is_masked_influences_nothing():
    wrapped = TokenLossModel(small_model())
    ids, labels, positions, documents = packed(5, 7)
    loss = wrapped(ids, labels, positions, documents)
    gradients = torch.autograd.grad(loss.sum(), list(wrapped.parameters()), allow_unused=True)
    ids[documents == -1] = 49
    poisoned = wrapped(ids, labels, positions, documents)
    again = torch.autograd.grad(poisoned.sum(), list(wrapped.parameters()), allow_unused=True)
    assert torch.equal(loss, poisoned)
    for one, two in zip(gradients, again, strict=True):
        assert one is None or torch.equal(one, two)


def test_presets_have_the_size_they_say():
    for name in ("tiny", "small"):
        preset = PRESETS[name]
        tokens = TokenInfo(preset.vocab_size, 1, 0)
        model = build_model(name, tokens, preset.context_length, seed=0)
        assert num_parameters(model) == preset.num_parameters()
    assert PRESETS["120m"].num_parameters() == pytest.approx(120e6, rel=0.1)
    assert PRESETS["280m"].num_parameters() == pytest.approx(280e6, rel=0.1)


def test_seed_decides_the_initialization():
    weights = [build_model("tiny", TOKENS, 16, seed).model.get_input_embeddings().weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_checkpoint_is_loaded_with_its_weights(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    loaded = build_model(str(tmp_path / "model"), TOKENS, 16, seed=5)
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    (tmp_path / "model" / "model.safetensors").unlink()
    fresh = build_model(str(tmp_path / "model"), TOKENS, 16, seed=5)
    assert not torch.equal(fresh.model.lm_head.weight, model.lm_head.weight)


def test_a_config_takes_the_tokenizers_vocabulary(model_config):
    model = build_model(str(model_config), TOKENS, 16, seed=0)
    assert model.model.get_input_embeddings().weight.shape == (50, 16)


def refused(name, tokens=TOKENS, context_length=16):
    with pytest.raises(ModelError) as caught:
        build_model(str(name), tokens, context_length, seed=0)
    return str(caught.value)


def test_unfit_models_are_refused(tmp_path):
    assert refused("no/such-model").startswith("model no/such-model: cannot be loaded (")
    small_model().save_pretrained(tmp_path / "small")
    assert refused(tmp_path / "small", TokenInfo(60, 1, 0)) == (
        f"model {tmp_path / 'small'}: has 50 embeddings, the tokenizer makes ids up to 59; "
        "set tokenize.tokenizer to the model's own tokenizer"
    )
    small_model("gpt2", n_positions=8).save_pretrained(tmp_path / "short")
    assert refused(tmp_path / "short") == (
        f"model {tmp_path / 'short'}: takes 8 positions, tokenize.context_length is 16; "
        "set tokenize.context_length=8 or less"
    )


def test_a_model_with_more_than_a_linear_head_is_refused(tmp_path):
    config = {
        "model_type": "cohere",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "logit_scale": 0.0625,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path / "config.json")
    assert "its logits are more than a linear head" in message


def test_a_model_that_lets_documents_mix_is_refused(tmp_path):
    config = {
        "model_type": "mamba",
        "hidden_size": 16,
        "state_size": 4,
        "num_hidden_layers": 1,
        "vocab_size": 50,
        "expand": 2,
        "conv_kernel": 4,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "packed sequence" in refused(tmp_path / "config.json")


def test_a_padding_id_freezes_nothing(tmp_path, model_config):
    """OPT-style configs name a padding id that is an ordinary token of our tokenizer."""
    config = {**json.loads(model_config.read_text()), "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (str(tmp_path / "config.json"), "tiny"):
        embeddings = build_model(name, TokenInfo(50, end_id=1, pad_id=1), 16, seed=0).model.get_input_embeddings()
        assert embeddings.padding_idx is None
        assert embeddings.weight[1].abs().sum() > 0


def test_a_damaged_checkpoint_is_named(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"garbage")
    assert refused(tmp_path / "model").startswith(f"model {tmp_path / 'model'}: cannot be loaded (")


def test_a_checkpoints_padding_id_freezes_nothing(tmp_path):
    small_model(pad_token_id=3).save_pretrained(tmp_path / "model")
    assert build_model(str(tmp_path / "model"), TOKENS, 16, seed=0).model.get_input_embeddings().padding_idx is None


def test_what_the_host_knows_reaches_the_loss(monkeypatch):
    given = []

    def spy(hidden_BTD, head_VD, labels_BT, **options):
        given.append(options)
        return torch.zeros(labels_BT.shape)

    monkeypatch.setattr(models, "linear_cross_entropy", spy)
    wrapped = TokenLossModel(small_model())
    ids, labels, positions, documents = packed(5, 7)
    wrapped(ids, labels, positions, documents)
    assert not any(value is not None for value in given.pop().values())
    wrapped.loss_kernel = "fused"
    index = (labels != -100).flatten().nonzero().squeeze(1)
    wrapped(ids, labels, positions, documents, index)
    assert given[0]["label_index_N"] is index
    assert given[0]["kernel"] == "fused"


# --- leaks ---


def everything_before(name, document_ids_BT, document_starts_C):
    """A mask with no borders."""
    B, T = document_ids_BT.shape
    return {"attention_mask": torch.ones(B, 1, T, T, dtype=torch.bool).tril()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_leak_is_found_in_any_precision(monkeypatch, kind, dtype):
    wrapped = TokenLossModel(small_model(kind).to(dtype))
    check_behavior(wrapped, "m", 16)
    monkeypatch.setattr(models, "attention_inputs", everything_before)
    with pytest.raises(ModelError) as caught:
        check_behavior(wrapped, "m", 16)
    assert str(caught.value) == (
        "model m: lets the documents of a packed sequence see each other (it ignores the attention mask or the "
        "positions); choose another model"
    )


def test_positions_that_do_not_restart_are_found():
    class Running(TokenLossModel):
        def forward(self, ids, labels, positions, *rest):
            return super().forward(ids, labels, torch.arange(ids.shape[1])[None], *rest)

    with pytest.raises(ModelError, match="the positions"):
        check_behavior(Running(small_model("gpt2")), "m", 16)


def test_a_model_without_finite_losses_is_refused(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    model.save_pretrained(tmp_path / "model")
    assert refused(tmp_path / "model") == (
        f"model {tmp_path / 'model'}: its losses on random tokens are not finite; choose another model"
    )


# --- GGUF ---

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_vocabulary():
    """A byte-level alphabet, two merges and an end token: 259 tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), "ab", "abc", "<|end|>"]


def write_gguf(path, model):
    """Writes a small Llama with a byte-level tokenizer as llama.cpp's converter does."""
    import gguf

    config, vocabulary = model.config, gguf_vocabulary()
    end = len(vocabulary) - 1
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * end + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    for key, parameter in model.named_parameters():
        array, name = parameter.detach().numpy(), key
        if "q_proj" in key or "k_proj" in key:  # llama.cpp pairs the numbers that a rotation turns
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_gguf(path):
    """Writes a file with a model of random weights, and returns the model."""
    model = small_model(num_key_value_heads=1, vocab_size=259, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_gguf(path, model)
    return model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, random_gguf(path)


def test_a_gguf_file_gives_the_weights_that_were_written(gguf_file, tmp_path, capfd):
    path, written = gguf_file
    model = build_model(str(path), TokenInfo(259, 258, 258), 16, seed=0)
    assert torch.equal(model(*packed(5, 7, 3)), TokenLossModel(written)(*packed(5, 7, 3)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr().err == ""
    save_model(model, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(load_trained(tmp_path / "saved")(*packed(5, 7, 3)), model(*packed(5, 7, 3)))


def test_gguf_errors_say_what_to_do(gguf_file, tmp_path, monkeypatch):
    path, _ = gguf_file
    assert refused(path, TokenInfo(260, 258, 258)).startswith(f"model {path}: has 259 embeddings")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    message = refused(tmp_path / "broken.gguf")
    assert message.startswith(f"model {tmp_path / 'broken.gguf'}: cannot be loaded (")
    assert "\n" not in message
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    assert refused(path) == (
        f"model {path}: reading it needs the package gguf, which is not installed; run: pip install 'doremi-mix[gguf]'"
    )


def test_only_a_json_file_or_a_folder_without_weights_is_a_config(tmp_path):
    for name in ("config.json", "model.gguf", "model.safetensors"):
        (tmp_path / name).touch()
    assert is_config_only(str(tmp_path / "config.json"))
    assert not is_config_only(str(tmp_path / "model.gguf"))
    assert not is_config_only(str(tmp_path / "model.safetensors"))
    assert not is_config_only(str(tmp_path))
    (tmp_path / "model.gguf").unlink()
    (tmp_path / "model.safetensors").unlink()
    assert is_config_only(str(tmp_path))


# --- saving ---


def test_a_state_that_was_gathered_is_saved_in_the_models_place(tmp_path):
    model = TokenLossModel(small_model(tie_word_embeddings=True), "m")
    gathered = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    assert "model.lm_head.weight" in gathered
    expected = model(*packed(16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_model(model, tmp_path / "model", gathered)
    assert torch.equal(load_trained(tmp_path / "model")(*packed(16)), expected)
    from safetensors import safe_open

    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no dictionary)


def test_a_model_that_cannot_be_read_back_is_named(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_trained(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"model {tmp_path}: cannot be loaded (")
    assert message.endswith("); run the stage that saved it again")


# --- gradient checkpointing ---


def losses_and_gradients(model):
    """Losses, gradients, and how many numbers were kept for the backward pass."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*packed(5, 7, 3))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), parameters)], sum(kept)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        # Its blocks apply dropout by themselves, by their own training flag.
        ("opt", {"dropout": 0.5}),
    ],
)
def test_checkpointing_changes_memory_and_no_number(kind, settings):
    model = TokenLossModel(small_model(kind, **settings))
    plain, kept = losses_and_gradients(model)
    keys = list(model.state_dict())
    enable_gradient_checkpointing(model)
    enable_gradient_checkpointing(model)  # again changes nothing
    recomputed, kept_less = losses_and_gradients(model)
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))
    assert kept_less < 0.6 * kept
    assert list(model.state_dict()) == keys
    assert not any(module.training for module in model.model.modules())
    with torch.no_grad():
        assert torch.equal(model(*packed(5, 7, 3)), plain[0])
    disable_gradient_checkpointing(model)
    assert losses_and_gradients(model)[1] == kept


def test_models_without_blocks_to_recompute_are_refused():
    model = TokenLossModel(small_model(), "some/model")
    model.model.supports_gradient_checkpointing = False
    with pytest.raises(ModelError) as caught:
        enable_gradient_checkpointing(model)
    assert str(caught.value) == (
        "model some/model: LlamaForCausalLM does not support gradient checkpointing; set gradient_checkpointing: false"
    )


# --- compilation ---


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own compiler looks at it
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_compile_once_for_all_and_back(kind, checkpointing):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = TokenLossModel(small_model(kind))
    (expected, _), keys = losses_and_gradients(model), list(model.state_dict())
    if checkpointing:
        enable_gradient_checkpointing(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)
    found, _ = losses_and_gradients(model)
    assert len(blocks(model)) == 2
    assert counter.frame_count == 1
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, found, strict=True))
    assert list(model.state_dict()) == keys
    undo_compile(model)
    torch._dynamo.reset()
    assert all(torch.equal(one, other) for one, other in zip(expected, losses_and_gradients(model)[0], strict=True))
    assert counter.frame_count == 1
