"""Baichuan2-7B's forward pass, written anew from its description; the conversion is compared with it.

Axes: B sequences, T tokens, D hidden size, H heads, S size of a head, V vocabulary.  The names of the modules are those
of the published checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ROPE_BASE = 10_000.0


class _RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        wide_BTD = hidden_BTD.float()
        scaled_BTD = wide_BTD * torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled_BTD.to(hidden_BTD.dtype)


def _rotate(states_BHTS: Tensor) -> Tensor:
    """Turns each pair (i, i + S/2) of a head by an angle that grows with the position."""
    num_tokens, size = states_BHTS.shape[-2:]
    frequencies = 1.0 / ROPE_BASE ** (torch.arange(0, size, 2).float() / size)
    angles_TS = torch.outer(torch.arange(num_tokens).float(), frequencies).repeat(1, 2)
    first, second = states_BHTS.float().chunk(2, dim=-1)
    turned_BHTS = states_BHTS.float() * angles_TS.cos() + torch.cat((-second, first), dim=-1) * angles_TS.sin()
    return turned_BHTS.to(states_BHTS.dtype)


class _Attention(nn.Module):
    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.W_pack = nn.Linear(size, 3 * size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        split = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.W_pack(hidden_BTD).chunk(3, -1)
        ]
        query_BHTS, key_BHTS, value_BHTS = split
        mixed_BHTS = functional.scaled_dot_product_attention(
            _rotate(query_BHTS), _rotate(key_BHTS), value_BHTS, is_causal=True
        )
        return self.o_proj(mixed_BHTS.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner_size, bias=False)
        self.up_proj = nn.Linear(size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))


class _Block(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        size, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = _Attention(size, config["num_attention_heads"])
        self.mlp = _MLP(size, config["intermediate_size"])
        self.input_layernorm = _RMSNorm(size, eps)
        self.post_attention_layernorm = _RMSNorm(size, eps)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD))
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class _Trunk(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(_Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = _RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.embed_tokens(input_ids_BT)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD)
        return self.norm(hidden_BTD)


class _NormHead(nn.Module):
    """Logits are products with the directions of the rows of the weight; their lengths play no part."""

    def __init__(self, size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD @ functional.normalize(self.weight, dim=1).T


class ReferenceBaichuan2(nn.Module):
    """The original model: ``load_state_dict`` takes the tensors of a published checkpoint by their own names.

    Args:
        config: what its ``config.json`` holds.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.model = _Trunk(config)
        self.lm_head = _NormHead(config["hidden_size"], config["vocab_size"])

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Returns the logits of the token after each position, shape [B, T, V]."""
        return self.lm_head(self.model(input_ids_BT))

    @torch.no_grad()
    def generate_greedily(self, input_ids_BT: Tensor, num_new_tokens: int) -> Tensor:
        """Appends the likeliest token, again and again, with the whole sequence computed each time."""
        for _ in range(num_new_tokens):
            next_B1 = self(input_ids_BT)[:, -1].argmax(-1, keepdim=True)
            input_ids_BT = torch.cat((input_ids_BT, next_B1), dim=1)
        return input_ids_BT
