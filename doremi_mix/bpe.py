"""A byte-level BPE trained on the data, so that a first run needs no download."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from doremi_mix.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
SMALLEST_VOCABULARY = 256 + 2
"""Every byte and the two special tokens."""

# Spaces join the word that follows, digits stand alone so that numbers are read digit by digit, Han text is kept apart
# from the Latin words inside it, and line breaks end a piece, so that "\n\n" is learned as one token.
_PRE_TOKEN_PATTERN = r" ?\p{Han}+| ?(?:(?!\p{Han})[\p{L}\p{M}])+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE, with which any text can be written.

    The same texts in the same order give the same ``tokenizer.json``, byte for byte.

    Args:
        texts: the training texts; consumed once, never held whole.
        vocab_size: the largest number of tokens; fewer come out when the texts are too small for that many merges.

    Returns:
        The trained tokenizer; id 0 is ``<|pad|>`` and id 1 is ``<|end|>``.  Store it with ``save(path)`` and read it
        back with ``load_tokenizer(path)``.

    Raises:
        ConfigError: ``vocab_size`` has no room for the 256 bytes and the two special tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size is too small: expected at least {SMALLEST_VOCABULARY} (256 bytes and 2 special tokens), "
            f"got {vocab_size}; 4096 suits small runs"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(tokenizers.Regex(_PRE_TOKEN_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((without_surrogates([text])[0] for text in texts), trainer)
    return tokenizer


def without_surrogates(texts: Sequence[str]) -> Sequence[str]:
    """Reads lone surrogates, which no encoding of Unicode can write, as U+FFFD."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]
    return texts
