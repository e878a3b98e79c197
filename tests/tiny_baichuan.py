"""Writes tiny random checkpoints in the layout in which Baichuan2 is published.

Used by the tests and by scripts; needs torch, safetensors and sentencepiece only.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path

import torch
from torch import Tensor

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
USER_SYMBOLS = ["\n", "<reserved_106>", "<reserved_107>", "</td>"]
NUM_TRAINED_PIECES = 600


def write_tiny_baichuan(
    folder,
    *,
    vocab_size=400,
    hidden_size=32,
    intermediate_size=88,
    num_layers=2,
    num_heads=2,
    dtype="float32",
    num_shards=2,
    format="bin",  # noqa: A002
    seed=0,
    tokenizer=None,
    max_position_embeddings=4096,
):
    """Writes config, generation config, weights and tokenizer of a random model of Baichuan2's form.

    Args:
        folder: is made if need be.
        vocab_size: rows of the embeddings, and pieces of the tokenizer.
        hidden_size, intermediate_size, num_layers, num_heads, max_position_embeddings: as in the config.
        dtype: of the weights: float32, bfloat16 or float16.
        num_shards: files of weights; with 1 there is no index.
        format: "bin" (torch) or "safetensors".
        seed: of the weights.
        tokenizer: a folder whose tokenizer files are copied; None to train one.

    Returns:
        The folder as a path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = vendor_config(
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, dtype, max_position_embeddings
    )
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "transformers_version": "4.29.2",
        },
    )
    write_weights(folder, random_weights(config, seed), num_shards, format)
    if tokenizer is None:
        train_tiny_tokenizer(folder, vocab_size)
    else:
        for name in TOKENIZER_FILES:
            shutil.copyfile(Path(tokenizer) / name, folder / name)
    return folder


def vendor_config(
    vocab_size, hidden_size, intermediate_size, num_layers, num_heads, dtype="bfloat16", max_position_embeddings=4096
):
    """Returns the content of a config.json."""
    return {
        "_from_model_config": True,
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "model_max_length": max_position_embeddings,
        "model_type": "baichuan",
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.29.2",
        "use_cache": True,
        "vocab_size": vocab_size,
        "z_loss_weight": 0,
    }


def random_weights(config, seed=0):
    """Yields names and tensors, one at a time, in the order of the published files."""
    generator = torch.Generator().manual_seed(seed)
    size, inner, vocab_size = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    dtype = getattr(torch, config["torch_dtype"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)

    def scale() -> Tensor:
        return (1 + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    yield "model.embed_tokens.weight", normal(vocab_size, size)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.W_pack.weight", normal(3 * size, size)
        yield f"{prefix}.self_attn.o_proj.weight", normal(size, size)
        head_size = size // config["num_attention_heads"]
        yield (
            f"{prefix}.self_attn.rotary_emb.inv_freq",
            10_000.0 ** -(torch.arange(0, head_size, 2).float() / head_size),
        )
        yield f"{prefix}.mlp.gate_proj.weight", normal(inner, size)
        yield f"{prefix}.mlp.down_proj.weight", normal(size, inner)
        yield f"{prefix}.mlp.up_proj.weight", normal(inner, size)
        yield f"{prefix}.input_layernorm.weight", scale()
        yield f"{prefix}.post_attention_layernorm.weight", scale()
    yield "model.norm.weight", scale()
    # The rows of the head have lengths of their own, which the model's head does away with.
    lengths = torch.rand(vocab_size, 1, generator=generator) * 3 + 0.1
    yield "lm_head.weight", (torch.randn(vocab_size, size, generator=generator) * lengths).to(dtype)


def write_weights(folder, tensors, num_shards=2, format="bin"):  # noqa: A002
    """Writes tensors in shards of about the same size, with an index if there are several.

    Args:
        folder: where to.
        tensors: pairs of name and tensor.
        num_shards, format: as in ``write_tiny_baichuan``.
    """
    from safetensors.torch import save_file

    tensors = dict(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    stem, suffix = ("pytorch_model", "bin") if format == "bin" else ("model", "safetensors")
    shards, done = [{} for _ in range(num_shards)], 0
    for name, tensor in tensors.items():
        shards[min(done * num_shards // total, num_shards - 1)][name] = tensor
        done += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}.{suffix}" if num_shards == 1 else f"{stem}-{number:05}-of-{num_shards:05}.{suffix}"
        if format == "bin":
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if num_shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{suffix}.index.json", index)


def train_tiny_tokenizer(folder, vocab_size):
    """Trains a SentencePiece model of exactly this many pieces, with the settings of Baichuan2's.

    Up to 600 pieces are learned or bytes; the rest are user-defined ``<reserved_...>`` symbols.

    Args:
        folder: gets tokenizer.model, tokenizer_config.json and special_tokens_map.json; is made if need be.
        vocab_size: at least 360.

    Returns:
        The folder as a path.
    """
    import sentencepiece

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reserved = [f"<reserved_{number}>" for number in range(108, 108 + max(0, vocab_size - NUM_TRAINED_PIECES))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*USER_SYMBOLS, *reserved],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    write_json(folder / "special_tokens_map.json", {role: {"content": text, **token} for role, text in special.items()})
    added = {str(id_): {"content": text, **token, "special": True} for id_, text in enumerate(("<unk>", "<s>", "</s>"))}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": added,
            "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "BaichuanTokenizer",
            "use_fast": False,
            **special,
        },
    )
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sentences():
    """Yields made-up words, enough for some hundreds of merges, and characters that the tests use."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ou")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(800)]
    chinese = [*"数据混合权重学习模型回答问题指令训练领域"]
    for _ in range(2000):
        yield " ".join(rng.choices(words, k=8)) + "  " + "".join(rng.choices(chinese, k=4)) + "，. \t1234567890"
    yield from ("The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs!")
