"""What a Baichuan2-7B checkpoint holds, and what it becomes: the same network under the names of Llama.

The two differ in two places only.  ``W_pack`` is query, key and value projection in one matrix, one below the other.
The head divides each row of its weight by the row's length at every call; a weight whose rows have length one already
makes it an ordinary linear layer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doremi_mix.errors import ModelError, short_reason

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

HEAD = "lm_head.weight"
ROPE_BASE = 10_000.0

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What the published code does whatever the config says, or what only a changed copy of it could mean.
_FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": ROPE_BASE, "rope_scaling": None}

# Settings of sampling, which transformers refuses to save where do_sample is not set.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, slots=True)
class Layout:
    """The form of a checkpoint.

    Attributes:
        vocab_size: rows of the embeddings and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the feed-forward blocks.
        num_layers: blocks.
        num_heads: attention heads; each has its own keys and values.
        context_length: tokens that the model was trained to see.
        rms_norm_eps: added to the mean square in the norms.
        initializer_range: standard deviation of a fresh weight.
        bos_id: the token that begins a document.
        eos_id: the token that ends one.
        pad_id: what fills a batch.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    context_length: int
    rms_norm_eps: float
    initializer_range: float
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class LlamaTensor:
    """One tensor of the result, and where it comes from.

    Attributes:
        name: in the Llama layout.
        shape: of it.
        source: the tensor that it is part or all of.
        first_row: where it begins in that.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    first_row: int = 0

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_layout(source: Path) -> Layout:
    """Reads the form of a checkpoint and refuses what has no Llama form.

    Args:
        source: the folder of a Baichuan2-7B checkpoint.

    Raises:
        ModelError: there is no config, it is damaged, or it is of another model, with the reason.
    """
    require_folder(source)
    path = source / CONFIG
    if not path.is_file():
        raise ModelError(f"{source}: holds no {CONFIG}; give the folder of Baichuan2-7B as it was downloaded")
    config = read_object(path)
    _check_model(source, config)
    sizes = {key: _positive(path, config, key) for key in _SIZES}
    length_key = "model_max_length" if config.get("model_max_length") is not None else "max_position_embeddings"
    if sizes["hidden_size"] % (2 * sizes["num_attention_heads"]):
        raise ModelError(
            f"{path}: hidden_size {sizes['hidden_size']} cannot be split into {sizes['num_attention_heads']} heads of "
            f"even size; fetch the file again"
        )
    return Layout(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        context_length=_positive(path, config, length_key),
        rms_norm_eps=_positive_number(path, config, "rms_norm_eps", 1e-6),
        initializer_range=_positive_number(path, config, "initializer_range", 0.02),
        bos_id=_token_id(path, config, "bos_token_id", 1),
        eos_id=_token_id(path, config, "eos_token_id", 2),
        pad_id=_token_id(path, config, "pad_token_id", 0),
    )


def require_folder(source: Path) -> None:
    """Makes sure that a checkpoint is a folder at all.

    Raises:
        ModelError: it is none.
    """
    if not source.is_dir():
        what = "is a file, expected a folder" if source.exists() else "no such folder"
        raise ModelError(f"{source}: {what}; give the folder of Baichuan2-7B as it was downloaded")


def vendor_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors of a checkpoint by their names in it."""
    shapes: dict[str, list[int]] = {}
    for tensor in llama_tensors(layout):
        shape = shapes.setdefault(tensor.source, [0, *tensor.shape[1:]])
        shape[0] += tensor.shape[0]
    return {name: tuple(shape) for name, shape in shapes.items()}


def llama_tensors(layout: Layout) -> list[LlamaTensor]:
    """Returns all tensors of the result, in the order of the forward pass."""
    size, inner = layout.hidden_size, layout.intermediate_size
    tensors = [_whole("model.embed_tokens.weight", layout.vocab_size, size)]
    for layer in range(layout.num_layers):
        block = f"model.layers.{layer}"
        tensors += [
            _whole(f"{block}.input_layernorm.weight", size),
            *(
                LlamaTensor(
                    f"{block}.self_attn.{part}_proj.weight",
                    (size, size),
                    f"{block}.self_attn.W_pack.weight",
                    number * size,
                )
                for number, part in enumerate("qkv")
            ),
            _whole(f"{block}.self_attn.o_proj.weight", size, size),
            _whole(f"{block}.post_attention_layernorm.weight", size),
            _whole(f"{block}.mlp.gate_proj.weight", inner, size),
            _whole(f"{block}.mlp.up_proj.weight", inner, size),
            _whole(f"{block}.mlp.down_proj.weight", size, inner),
        ]
    return [*tensors, _whole("model.norm.weight", size), _whole(HEAD, layout.vocab_size, size)]


def llama_config(layout: Layout, dtype: str) -> dict[str, Any]:
    """Returns the config of the result, as transformers 4 and 5 both read it.

    Args:
        layout: of the checkpoint.
        dtype: of its weights: ``bfloat16`` and so on.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": layout.bos_id,
        "eos_token_id": layout.eos_id,
        "head_dim": layout.hidden_size // layout.num_heads,
        "hidden_act": "silu",
        "hidden_size": layout.hidden_size,
        "initializer_range": layout.initializer_range,
        "intermediate_size": layout.intermediate_size,
        "max_position_embeddings": layout.context_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": layout.num_heads,
        "num_hidden_layers": layout.num_layers,
        "num_key_value_heads": layout.num_heads,
        "pad_token_id": layout.pad_id,
        "rms_norm_eps": layout.rms_norm_eps,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": layout.vocab_size,
    }


def llama_generation_config(source: Path, layout: Layout) -> dict[str, Any]:
    """Returns the generation settings of the checkpoint, in a form that transformers can load and save.

    Args:
        source: the folder of the checkpoint.
        layout: of it.

    Raises:
        ModelError: the file is damaged.
    """
    path = source / GENERATION_CONFIG
    given = read_object(path) if path.is_file() else {}
    ids = {"bos_token_id": layout.bos_id, "eos_token_id": layout.eos_id, "pad_token_id": layout.pad_id}
    kept = {
        key: value
        for key, value in given.items()
        if not key.startswith("_")
        and key != "transformers_version"
        and (key not in _SAMPLING or given.get("do_sample") is True)
    }
    return ids | kept


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: the file holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is not valid JSON ({short_reason(error)}); fetch the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got a {type(value).__name__}; fetch the file again")
    return value


def _check_model(source: Path, config: dict[str, Any]) -> None:
    """Raises a ModelError where the config is of another model."""
    model_type = config.get("model_type")
    if model_type == "llama":
        raise ModelError(f"{source}: is in Llama layout already; there is nothing to convert, use it as it is")
    if model_type != "baichuan":
        raise ModelError(
            f"{source}: expected a Baichuan2-7B checkpoint (model_type baichuan), got model_type {model_type}; "
            f"give the folder of Baichuan2-7B as it was downloaded"
        )
    is_13b = config.get("hidden_size") == 5120 or (
        config.get("num_hidden_layers") == config.get("num_attention_heads") == 40
    )
    if is_13b or "alibi" in str(config.get("position_embedding", "")).lower():
        raise ModelError(
            f"{source}: is a model of the 13B form, which tells positions by ALiBi instead of rotary embeddings; ALiBi "
            f"has no Llama form; give Baichuan2-7B"
        )
    if config.get("vocab_size") == 64_000:
        raise ModelError(
            f"{source}: is Baichuan 1 (64,000 tokens), whose head does not normalize its rows, so that it would be "
            f"converted wrongly; give Baichuan2-7B (125,696 tokens)"
        )
    if config.get("quantization_config") is not None:
        raise ModelError(f"{source}: holds quantized weights; give the checkpoint in full precision")
    for key, expected in _FIXED.items():
        if key in config and config[key] != expected:
            raise ModelError(
                f"{source / CONFIG}: {key} is {json.dumps(config[key])}, Baichuan2-7B has {json.dumps(expected)}; "
                f"this is another model, give Baichuan2-7B"
            )


def _positive(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"{path}: expected {key} to be a positive integer, got {json.dumps(value)}; fetch the file again"
        )
    return value


def _positive_number(path: Path, config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(
            f"{path}: expected {key} to be a positive number, got {json.dumps(value)}; fetch the file again"
        )
    return float(value)


def _token_id(path: Path, config: dict[str, Any], key: str, default: int) -> int:
    """Returns a token id, which some copies of the config leave out or set to null."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < config["vocab_size"]:
        raise ModelError(
            f"{path}: expected {key} to be a token id below vocab_size {config['vocab_size']:,}, got "
            f"{json.dumps(value)}; fetch the file again"
        )
    return value


def _whole(name: str, *shape: int) -> LlamaTensor:
    """A tensor that is taken over under its own name."""
    return LlamaTensor(name, shape, name)
