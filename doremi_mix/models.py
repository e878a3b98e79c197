"""Causal language models: from a preset, a Hugging Face config, a checkpoint or a GGUF file, or LoRA over one of these.

Axes: B sequences, T tokens, D hidden size, N tokens that count, C document starts.  Models see packed sequences:
documents in a sequence do not attend to each other, and positions restart.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from doremi_mix.adapter_layers import allow_compiled_checkpointing, keep_gradients_of_quantized_layers
from doremi_mix.adapters import (
    LoraSettings,
    active_adapter,
    add_adapter,
    base_fingerprint,
    base_of,
    has_adapter_dropout,
    is_adapter_folder,
    load_adapter,
    save_adapter,
)
from doremi_mix.attention import attention_inputs, use_attention
from doremi_mix.errors import ModelError, short_reason
from doremi_mix.fitness import check_behavior, check_size
from doremi_mix.loss import LossKernel, linear_cross_entropy
from doremi_mix.presets import PRESETS, is_config_only
from doremi_mix.quantization import Quantization, quantized_options


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """What a model must know of the tokenizer."""

    vocab_size: int
    end_id: int
    pad_id: int


class TokenLossModel(nn.Module):
    """A causal language model whose forward pass returns the loss of each token instead of logits.

    Attributes:
        model: the transformers model.
        name: what loads it; with an adapter, what loads its base.
        adapter: the LoRA adapter that this is, if any; others may share the same ``model``.
        loss_kernel: how the loss is computed, see ``doremi_mix.loss``; None for plain torch.
        attention: how documents are kept apart: ``sdpa``, ``varlen`` or ``flex``, see ``doremi_mix.attention``.
    """

    def __init__(self, model: Any, name: str = "", adapter: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.adapter = adapter
        self.loss_kernel: LossKernel | None = None
        self._attention = "sdpa"
        self._own_attention = model.config._attn_implementation

    @property
    def attention(self) -> str:
        """How documents are kept apart."""
        return self._attention

    @attention.setter
    def attention(self, name: str) -> None:
        use_attention(self.model, name, self._own_attention)
        self._attention = name

    def forward(
        self,
        input_ids_BT: Tensor,
        labels_BT: Tensor,
        position_ids_BT: Tensor,
        document_ids_BT: Tensor,
        label_index_N: Tensor | None = None,
        document_starts_C: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss on each token in nats, shape [B, T], 0 where the label is -100.

        Args:
            input_ids_BT: token ids.
            labels_BT: the token that each position predicts, already shifted; -100 where none counts.
            position_ids_BT: positions, restarting in each document.
            document_ids_BT: which document of its sequence a token belongs to; -1 on padding.
            label_index_N: where labels count, among the B x T tokens laid end to end; found from the labels if None,
                for which a device is waited for.
            document_starts_C: from ``attention.document_starts``, needed by ``varlen`` only; the same holds.

        Raises:
            RuntimeError: another adapter of the same base is active; activate this model's own first.
        """
        if self.adapter is not None and active_adapter(self.model) != self.adapter:
            raise RuntimeError(f'adapter "{active_adapter(self.model)}" is active in the place of "{self.adapter}"')
        hidden_BTD = self.model.base_model(
            input_ids=input_ids_BT,
            position_ids=position_ids_BT,
            use_cache=False,
            **attention_inputs(self._attention, document_ids_BT, document_starts_C),
        ).last_hidden_state
        head_VD = self.model.get_output_embeddings().weight
        return linear_cross_entropy(
            hidden_BTD, head_VD, labels_BT, label_index_N=label_index_N, kernel=self.loss_kernel
        )


def build_model(
    name: str,
    tokens: TokenInfo,
    context_length: int,
    seed: int,
    *,
    trust_remote_code: bool = False,
    lora: LoraSettings | None = None,
    adapter: str = "proxy",
    base_dtype: torch.dtype | None = None,
    quantization: Quantization = "none",
) -> TokenLossModel:
    """Builds or loads a causal language model and checks that it keeps packed documents apart.

    The model is put into evaluation mode and trained there: dropout would make the losses that decide the domain
    weights differ from the losses whose gradient they weight.  A fine-tune turns on that of its adapter alone.

    With ``lora``, the checkpoint's own weights are frozen and an adapter is what is trained.  The base is loaded once a
    process: a second adapter on the same base shares its memory (see ``forget_base``).  The adapter that was built
    last is the active one; an adapter of the same name is replaced.

    Args:
        name: a preset, a Hugging Face ``config.json`` (or a folder with nothing else), or a checkpoint: a folder, a
            ``.gguf`` file or the name of a model on the hub.
        tokens: of the run's tokenizer.
        context_length: tokens in a packed sequence.
        seed: of a fresh initialization.
        trust_remote_code: let a hub model run its own code.
        lora: the form of the adapter; None to train all weights.
        adapter: what to call it.
        base_dtype: of the frozen weights under an adapter; None for float32.
        quantization: holds these in fewer bits.

    Returns:
        The model in float32 on the CPU; with an adapter, wherever and in whatever format its base is.

    Raises:
        ModelError: it cannot be loaded, is too small for the vocabulary or the context, is no causal language model, or
            lets packed documents see each other.
    """
    fresh = name in PRESETS or is_config_only(name)
    if lora is None:
        torch.manual_seed(seed)
        with _explained(name):
            if fresh:
                model = _from_config(name, tokens, context_length, trust_remote_code=trust_remote_code)
            else:
                model = _from_pretrained(name, torch.float32, trust_remote_code=trust_remote_code)
        # A padding id, often the end token's, would freeze its row; padding is masked anyway.
        model.get_input_embeddings().padding_idx = None
        check_size(model, name, tokens.vocab_size, context_length)
        wrapped = TokenLossModel(model.float().eval(), name)
        check_behavior(wrapped, name, context_length)
        return wrapped
    if fresh:
        raise ModelError(
            f"model {name}: starts from random weights, and an adapter is trained over trained ones; "
            "give a checkpoint, or leave lora_rank out"
        )
    base = _load_base(name, base_dtype, trust_remote_code=trust_remote_code, quantization=quantization)
    check_size(base, name, tokens.vocab_size, context_length)
    add_adapter(base, adapter, lora, seed)
    return TokenLossModel(base, name, adapter)


def load_trained(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    adapter: str = "reference",
    base: str | None = None,
    base_dtype: torch.dtype | None = None,
    quantization: Quantization = "none",
) -> TokenLossModel:
    """Loads a model that an earlier stage saved: all of it, or an adapter onto its base.

    Args:
        folder: what ``save_model`` wrote.
        trust_remote_code: let a hub model run its own code.
        adapter: what to call the adapter, if it is one; the base is shared as in ``build_model``.
        base: what loads the weights under an adapter; None for where they were when it was saved.
        base_dtype: of these; None for float32.
        quantization: holds these in fewer bits.

    Raises:
        ModelError: it cannot be loaded.
    """
    if not is_adapter_folder(folder):
        with _explained(str(folder), "run the stage that saved it again"):
            model = _from_pretrained(str(folder), torch.float32, trust_remote_code=trust_remote_code)
        return TokenLossModel(model.eval(), str(folder))
    name = base or base_of(folder)
    model = _load_base(name, base_dtype, trust_remote_code=trust_remote_code, quantization=quantization)
    load_adapter(model, adapter, folder, fingerprint=base_fingerprint(name))
    return TokenLossModel(model, name, adapter)


def save_model(model: TokenLossModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Saves a model in Hugging Face layout, an adapter in peft's.

    Args:
        model: to be saved.
        folder: is made if need be.
        state: the whole tensors of ``model`` by name, where it holds only parts of them (under FSDP).
    """
    if state is not None:
        state = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    if model.adapter is not None:
        base = Path(model.name).expanduser()
        place = str(base.resolve()) if base.exists() else model.name
        save_adapter(model.model, model.adapter, folder, place, state, fingerprint=base_fingerprint(model.name))
        return
    if state is not None:
        # Tied weights are one tensor in the model, but several in a state that was gathered.
        own = {*dict(model.model.named_parameters()), *dict(model.model.named_buffers())}
        state = {key: tensor for key, tensor in state.items() if key in own}
    model.model.save_pretrained(str(folder), state_dict=state)


def num_parameters(model: nn.Module) -> int:
    """Counts the parameters; tied ones once, and of several adapters on one base only the model's own."""
    adapter = getattr(model, "adapter", None)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name or f".{adapter}." in name
    )


def embedding_parameters(model: TokenLossModel) -> set[int]:
    """Returns the ids of the parameters that are indexed by a token: the embeddings and the output head."""
    layers = (model.model.get_input_embeddings(), model.model.get_output_embeddings())
    return {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}


def blocks(model: TokenLossModel) -> list[nn.Module]:
    """Returns the blocks that a model repeats, in order; empty if it is not made of such."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for name, module in model.model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return list(found.values())


def enable_gradient_checkpointing(model: TokenLossModel) -> None:
    """Lets each block keep only its input for the backward pass and compute the rest again: a third more operations.

    transformers' own switch asks for training mode, which would also turn on the dropout of blocks that apply it
    themselves; so each block's forward method is replaced on the block.

    Raises:
        ModelError: the model has no blocks that can be computed again.
    """
    repeated = blocks(model)
    if not repeated or not model.model.supports_gradient_checkpointing:
        raise ModelError(
            f"model {model.name}: {type(model.model).__name__} does not support gradient checkpointing; "
            "set gradient_checkpointing: false"
        )
    is_random = has_adapter_dropout(model.model)
    for block in repeated:
        block.forward = functools.partial(_checkpointed, block, is_random)


def disable_gradient_checkpointing(model: TokenLossModel) -> None:
    """Takes ``enable_gradient_checkpointing`` back."""
    for block in blocks(model):
        block.__dict__.pop("forward", None)


def compile_blocks(model: TokenLossModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles each block in place with torch.compile; names in the state stay as they are.

    The blocks share their code, so that one is compiled and the others find it in the cache.

    Args:
        model: whose blocks are compiled when they are first called.
        backend: of torch.compile.
    """
    allow_compiled_checkpointing()
    for block in blocks(model):
        block.compile(backend=backend)


def undo_compile(model: TokenLossModel) -> None:
    """Takes ``compile_blocks`` back."""
    for block in blocks(model):
        block._compiled_call_impl = None


def forget_base() -> None:
    """Frees the base model that adapters share, once the last model on it is gone."""
    if not _base:
        return
    _base.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_base: dict[tuple[Any, ...], TokenLossModel] = {}
"""The one base model under adapters, by what it was loaded from: stages in one process share its memory."""


def _load_base(
    name: str, dtype: torch.dtype | None, *, trust_remote_code: bool, quantization: Quantization = "none"
) -> Any:
    """Returns the frozen model under adapters, from memory where it is the same as last time."""
    key = (*_identity(name), dtype or torch.float32, trust_remote_code, quantization)
    # One that FSDP split over processes cannot be split again.
    if key not in _base or any(isinstance(parameter, DTensor) for parameter in _base[key].parameters()):
        forget_base()
        with _explained(name):
            model = _from_pretrained(
                name, dtype or torch.float32, trust_remote_code=trust_remote_code, quantization=quantization
            )
        wrapped = TokenLossModel(model.eval().requires_grad_(False), name)
        # Before the first pass: one without gradient would leave them in a form that has none.
        keep_gradients_of_quantized_layers(model)
        check_behavior(wrapped, name, 16)
        _base[key] = wrapped
    base = _base[key]
    # What another stage chose for its steps does not hold for the next.
    base.attention = "sdpa"
    disable_gradient_checkpointing(base)
    undo_compile(base)
    base.zero_grad(set_to_none=True)
    return base.model


def _identity(name: str) -> tuple[Any, ...]:
    """Returns what tells a checkpoint from another, or from what lay in its place before."""
    path = Path(name).expanduser()
    if not path.exists():
        return (name,)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return (str(path.resolve()), *((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@contextlib.contextmanager
def _explained(
    name: str, advice: str = f"give a preset ({', '.join(PRESETS)}), a config.json, or a checkpoint folder"
) -> Iterator[None]:
    """Turns what goes wrong while a model is loaded into one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # damaged files and wrong settings come as many classes, all the user's to settle
        raise ModelError(f"model {name}: cannot be loaded ({short_reason(error)}); {advice}") from None


def _from_config(name: str, tokens: TokenInfo, context_length: int, *, trust_remote_code: bool) -> Any:
    """Makes a transformers model with random weights, of a preset or of a ``config.json``."""
    transformers = _import_transformers()
    if name in PRESETS:
        config = _preset_config(name, tokens, context_length)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    config.vocab_size = tokens.vocab_size
    # A padding id would freeze its row of the embeddings, and padding is masked anyway.
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokens.end_id, None
    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _from_pretrained(
    name: str, dtype: torch.dtype, *, trust_remote_code: bool, quantization: Quantization = "none"
) -> Any:
    """Loads a transformers model from a folder, a GGUF file or the hub.

    Raises:
        ModelError: it needs a package that is not installed, or is an adapter.
    """
    transformers = _import_transformers()
    if is_adapter_folder(name):
        base = base_of(Path(name).expanduser())
        raise ModelError(f"model {name}: is an adapter and not a whole model; give its base, {base}")
    load = transformers.AutoModelForCausalLM.from_pretrained
    if not name.endswith(".gguf"):
        options = quantized_options(quantization, name, dtype)
        return load(name, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if quantization != "none":
        raise ModelError(f"model {name}: a GGUF file has its own quantization; leave finetune.quantization out")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model {name}: reading it needs the package gguf, which is not installed; "
            "run: pip install 'doremi-mix[gguf]'"
        )
    path = Path(name).expanduser()
    gguf_options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):
        # Where it has kernels for them, transformers keeps quantized weights, which cannot be trained.
        gguf_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # It draws a progress bar of its own, and a run has one voice.
    with contextlib.redirect_stderr(io.StringIO()):
        model = load(str(path.parent), **gguf_options)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # The weights are plain now, and are saved as such.
        quantizer.remove_quantization_config(model)
    return model


def _checkpointed(block: nn.Module, is_random: bool, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # What was dropped must be dropped again; without dropout, no random state is worth keeping.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=is_random, **kwargs)


def _import_transformers() -> Any:
    """Imports transformers without its own progress bars: a run has one voice."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _preset_config(name: str, tokens: TokenInfo, context_length: int) -> Any:
    import transformers

    preset = PRESETS[name]
    return transformers.LlamaConfig(
        vocab_size=tokens.vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_heads,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokens.end_id,
        # A padding id would freeze its row of the embeddings, and padding is masked anyway.
        pad_token_id=None,
    )
