"""Whether a model fits the pipeline: its size, its head, and that packed documents do not see each other in it.

Axes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doremi_mix.errors import ModelError, short_reason


def check_size(model: Any, name: str, vocab_size: int, context_length: int) -> None:
    """Refuses a transformers model that is too small for the ids or the positions it will get.

    Raises:
        ModelError: it has fewer embeddings than ``vocab_size``, or takes fewer positions than ``context_length``.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    if embeddings < vocab_size:
        raise ModelError(
            f"model {name}: has {embeddings:,} embeddings, the tokenizer makes ids up to {vocab_size - 1:,}; "
            "set tokenize.tokenizer to the model's own tokenizer"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit < context_length:
        raise ModelError(
            f"model {name}: takes {limit:,} positions, tokenize.context_length is {context_length:,}; "
            f"set tokenize.context_length={limit} or less"
        )


@torch.no_grad()
def check_behavior(wrapped: Any, name: str, context_length: int) -> None:
    """Proves on random tokens that our loss is the model's own, and that packed documents do not see each other.

    Args:
        wrapped: a ``TokenLossModel``.
        name: for messages.
        context_length: tokens in a packed sequence.

    Raises:
        ModelError: it does not run, has more than a linear head, or lets documents see each other.
    """
    length = min(8, context_length // 2)
    generator = torch.Generator().manual_seed(0)
    weight = wrapped.model.get_input_embeddings().weight
    ids_BT, other_BT = torch.randint(weight.shape[0], (2, 1, 2 * length), generator=generator)
    labels_BT = ids_BT.roll(-1, dims=1)
    documents_BT = torch.arange(2).repeat_interleave(length)[None]
    positions_BT = torch.arange(length).repeat(2)[None]
    second = slice(length, None)
    # The same second document, behind another first one.
    other_BT = torch.cat([other_BT[:, :length], ids_BT[:, second]], dim=1)
    # A quantized model is on its GPU from the start.
    ids_BT, other_BT, labels_BT, documents_BT, positions_BT = (
        tensor.to(weight.device) for tensor in (ids_BT, other_BT, labels_BT, documents_BT, positions_BT)
    )
    try:
        packed_BT = wrapped(ids_BT, labels_BT, positions_BT, documents_BT)
        behind_other_BT = wrapped(other_BT, labels_BT, positions_BT, documents_BT)
        alone_BT = wrapped(ids_BT[:, second], labels_BT[:, second], positions_BT[:, second], documents_BT[:, second])
        logits_BTV = wrapped.model(input_ids=ids_BT[:, second], use_cache=False).logits.float()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model {name}: does not run as a causal language model on packed sequences ({short_reason(error)}); "
            "choose another model"
        ) from None
    if not torch.isfinite(packed_BT).all():
        raise ModelError(f"model {name}: its losses on random tokens are not finite; choose another model")
    own_BT = nn.functional.cross_entropy(logits_BTV[0], labels_BT[0, second], reduction="none")[None]
    tolerance = max(1e-3, 8 * torch.finfo(weight.dtype).eps)
    if not torch.allclose(alone_BT, own_BT, atol=tolerance, rtol=tolerance):
        raise ModelError(
            f"model {name}: its logits are more than a linear head (a cap, a scale or a bias), which the loss does "
            "not support; choose another model"
        )
    # In half precision the losses of a document alone are rounded otherwise than those of the same document packed, by
    # as much as a leak may change them.  What lies in another document rounds nothing: its change must not be seen.
    leaks = not torch.allclose(packed_BT[:, second], behind_other_BT[:, second], atol=1e-4, rtol=0)
    # Wrong positions change every token, rounding changes single ones most.
    moved = (packed_BT[:, second] - alone_BT).abs().mean() > tolerance * (1 + alone_BT.mean())
    if leaks or moved:
        raise ModelError(
            f"model {name}: lets the documents of a packed sequence see each other (it ignores the attention mask or "
            "the positions); choose another model"
        )
