"""The sizes of proxy models that can be asked for by name; numbers only, so that the command line can show them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Preset:
    """A Llama-like model with tied embeddings.

    Attributes:
        num_layers: transformer blocks.
        hidden_size: D.
        num_heads: attention heads.
        intermediate_size: of the gated feed-forward layer.
        vocab_size: of the byte-level BPE that is trained when no tokenizer is given.
        context_length: tokens in a packed sequence.
        learning_rate: peak, AdamW.
        embedding_factor: how much faster the embeddings learn.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    learning_rate: float
    embedding_factor: float = 10.0

    def num_parameters(self, vocab_size: int | None = None) -> int:
        """Counts the parameters for a vocabulary (by default the preset's own)."""
        block = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_layers * block + (vocab_size or self.vocab_size) * self.hidden_size + self.hidden_size


PRESETS: dict[str, Preset] = {
    "tiny": Preset(3, 96, 3, 256, 4096, 256, 3e-3, 20.0),
    "small": Preset(6, 256, 4, 688, 16_384, 512, 1e-3),
    "120m": Preset(12, 768, 12, 2048, 32_768, 1024, 6e-4),
    "280m": Preset(20, 1024, 16, 2736, 32_768, 1024, 4e-4),
}
"""tiny is for two CPU cores and a few minutes, small for many cores or any GPU; 120m and 280m are the sizes of the
official DoReMi repository and of the paper, for a data-center GPU."""


def is_config_only(name: str) -> bool:
    """Says whether a model is given by its ``config.json`` alone, so that its weights start fresh."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.suffix == ".json"
    weights = ("*.safetensors", "*.bin", "*.gguf")
    return (path / "config.json").is_file() and not any(any(path.glob(pattern)) for pattern in weights)


def describe_presets() -> str:
    """Returns one line per preset with its size and cost, for the help text."""
    lines = []
    for name, preset in PRESETS.items():
        parameters = preset.num_parameters()
        # 6 N operations train on a token, 2 N score it with the reference: 14 N in all.
        lines.append(
            f"{name}: {parameters / 1e6:.1f} M parameters at vocabulary {preset.vocab_size:,}, "
            f"{14 * parameters * 1e6 / 1e15:.2g} PFLOP per million proxy tokens (reference, losses and proxy)"
        )
    return "\n".join(lines)
