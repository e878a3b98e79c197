"""Causal language models: from a preset, a Hugging Face config or a checkpoint.

Axes: B sequences, T tokens, D hidden size.  Models see packed sequences: documents in a sequence do not attend to each
other, and positions restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doremi_mix.errors import ModelError
from doremi_mix.loss import linear_cross_entropy
from doremi_mix.presets import PRESETS, is_config_only


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """What a model must know of the tokenizer."""

    vocab_size: int
    end_id: int
    pad_id: int


class TokenLossModel(nn.Module):
    """A causal language model whose forward pass returns the loss of each token instead of logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor, document_ids_BT: Tensor
    ) -> Tensor:
        """Returns the loss on each token in nats, shape [B, T], 0 where the label is -100.

        Args:
            input_ids_BT: token ids.
            labels_BT: the token that each position predicts, already shifted; -100 where none counts.
            position_ids_BT: positions, restarting in each document.
            document_ids_BT: which document of its sequence a token belongs to; -1 on padding.
        """
        hidden_BTD = self.model.base_model(
            input_ids=input_ids_BT,
            attention_mask=document_mask(document_ids_BT),
            position_ids=position_ids_BT,
            use_cache=False,
        ).last_hidden_state
        return linear_cross_entropy(hidden_BTD, self.model.get_output_embeddings().weight, labels_BT)


def document_mask(document_ids_BT: Tensor) -> Tensor:
    """Returns who may attend to whom, shape [B, 1, T, T]: earlier tokens of the same document, and oneself.

    Padding attends to padding, so that no row is empty (a softmax over nothing is NaN).
    """
    T = document_ids_BT.shape[1]
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=document_ids_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]


def build_model(
    name: str, tokens: TokenInfo, context_length: int, seed: int, *, trust_remote_code: bool = False
) -> TokenLossModel:
    """Builds or loads a causal language model and checks that it keeps packed documents apart.

    The model is put into evaluation mode and trained there: dropout would make the losses that decide the domain
    weights differ from the losses whose gradient they weight.

    Args:
        name: a preset, a Hugging Face ``config.json`` (or a folder with nothing else), or a checkpoint: a folder or the
            name of a model on the hub.
        tokens: of the run's tokenizer.
        context_length: tokens in a packed sequence.
        seed: of a fresh initialization.
        trust_remote_code: let a hub model run its own code.

    Returns:
        The model on the CPU, in float32.

    Raises:
        ModelError: it cannot be loaded, is too small for the vocabulary or the context, is no causal language model, or
            lets packed documents see each other.
    """
    transformers = _import_transformers()
    torch.manual_seed(seed)
    try:
        if name in PRESETS:
            config = _preset_config(name, tokens, context_length)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        elif is_config_only(name):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            config.vocab_size = tokens.vocab_size
            # A padding id would freeze its row of the embeddings, and padding is masked anyway.
            config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokens.end_id, None
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # damaged files and wrong settings come as many classes, all the user's to settle
        raise ModelError(
            f"model {name}: cannot be loaded ({_first_line(error)}); "
            f"give a preset ({', '.join(PRESETS)}), a config.json, or a checkpoint folder"
        ) from None
    _check_size(model, name, tokens, context_length)
    wrapped = TokenLossModel(model.float().eval())
    _check_behavior(wrapped, name, context_length)
    return wrapped


def load_trained(folder: Path, *, trust_remote_code: bool = False) -> TokenLossModel:
    """Loads a model that an earlier stage saved."""
    transformers = _import_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    return TokenLossModel(model.eval())


def num_parameters(model: nn.Module) -> int:
    """Counts the parameters; tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


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


def _check_size(model: Any, name: str, tokens: TokenInfo, context_length: int) -> None:
    embeddings = model.get_input_embeddings().weight.shape[0]
    if embeddings < tokens.vocab_size:
        raise ModelError(
            f"model {name}: has {embeddings:,} embeddings, the tokenizer makes ids up to {tokens.vocab_size - 1:,}; "
            "set tokenize.tokenizer to the model's own tokenizer"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit < context_length:
        raise ModelError(
            f"model {name}: takes {limit:,} positions, tokenize.context_length is {context_length:,}; "
            f"set tokenize.context_length={limit} or less"
        )


@torch.no_grad()
def _check_behavior(wrapped: TokenLossModel, name: str, context_length: int) -> None:
    """Proves on random tokens that our loss is the model's own, and that packed documents do not see each other."""
    length = min(8, context_length // 2)
    generator = torch.Generator().manual_seed(0)
    vocab_size = wrapped.model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(vocab_size, (1, 2 * length), generator=generator)
    labels_BT = ids_BT.roll(-1, dims=1)
    documents_BT = torch.arange(2).repeat_interleave(length)[None]
    positions_BT = torch.arange(length).repeat(2)[None]
    try:
        packed_BT = wrapped(ids_BT, labels_BT, positions_BT, documents_BT)
        second = slice(length, None)
        alone_BT = wrapped(ids_BT[:, second], labels_BT[:, second], positions_BT[:, second], documents_BT[:, second])
        logits_BTV = wrapped.model(input_ids=ids_BT[:, second], use_cache=False).logits.float()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model {name}: does not run as a causal language model on packed sequences ({_first_line(error)}); "
            "choose another model"
        ) from None
    own_BT = nn.functional.cross_entropy(logits_BTV[0], labels_BT[0, second], reduction="none")[None]
    if not torch.allclose(alone_BT, own_BT, atol=1e-3, rtol=1e-3):
        raise ModelError(
            f"model {name}: its logits are more than a linear head (a cap, a scale or a bias), which the loss does "
            "not support; choose another model"
        )
    if not torch.allclose(packed_BT[:, second], alone_BT, atol=1e-3, rtol=1e-3):
        raise ModelError(
            f"model {name}: lets the documents of a packed sequence see each other (it ignores the attention mask or "
            "the positions); choose another model"
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
