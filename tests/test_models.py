"""Packed documents do not see each other, padding influences nothing, and unfit models are refused."""

import json

import pytest
import torch
import transformers

from doremi_mix.errors import ModelError
from doremi_mix.models import TokenInfo, TokenLossModel, build_model, document_mask, num_parameters
from doremi_mix.presets import PRESETS

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
