"""Vectors of texts, near each other where the texts are alike: by hashed character n-grams, or by a model's states.

Axes: N texts, D dimensions of a vector, C characters of a chunk, B texts of a batch, T tokens of a text.
Vectors are float32 of length 1; a text without content gets zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import ConfigError, ModelError, short_reason
from doremi_mix.filters.texts import code_points
from doremi_mix.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

MAX_TOKENS = 512
"""Where a model stops reading a text unless told otherwise."""

# What is worked on at once: its hashes and counts stay in a core's cache.
_CHUNK_BYTES = 1 << 15
_CHUNK_TEXTS = 1024
# Slots in which the n-grams of one size of a text are counted, per character: few n-grams share one by chance.
_SLOTS_PER_CHARACTER = 4
# Above it no letter has another case.
_LAST_CASED = 0x1E944
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65_536}


def ngram_embeddings(
    texts: pa.Array, *, dimensions: int = 256, ngram_sizes: Sequence[int] = (1, 2, 3), seed: int = 0
) -> NDArray[np.float32]:
    """Embeds texts of any language by the character n-grams that they consist of; needs no model.

    A text is put into Unicode's form NFKC, case is folded, a run of white space becomes one space, and one space is put
    at either end.  Each n-gram g that occurs c times adds (1 + ln c) * sign(g) at the dimension h(g), where sign and h
    are a hash (feature hashing, or count sketch); the sum is scaled to length 1.  Up to the noise of the hash, which
    falls with the root of the dimensions, cosines are those of the vectors of all n-grams.  The occurrences are
    counted by another hash, in at least 4 slots per character, so a few n-grams take part of another's count.

    A vector depends on its own text alone, so it is the same in whatever batch or shard.

    Args:
        texts: N strings; null counts as "".
        dimensions: D.
        ngram_sizes: how many characters make an n-gram; all sizes are used together.
        seed: of the hash.

    Returns:
        The vectors, shape [N, D]; zeros for a text without any n-gram, for example an empty one.

    Raises:
        ValueError: ``dimensions`` is below 1, or there is no size, or one below 1.

    Example:
        >>> import pyarrow as pa
        >>> vectors_ND = ngram_embeddings(pa.array(["Spring rain falls.", "spring  RAIN fell", "股票市场下跌", ""]))
        >>> [round(float(cosine), 1) for cosine in vectors_ND @ vectors_ND[0]]
        [1.0, 0.8, 0.0, 0.0]

    Reference:
        K. Weinberger et al., Feature Hashing for Large Scale Multitask Learning, https://arxiv.org/abs/0902.2206.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions must be at least 1, got {dimensions}")
    if not ngram_sizes or min(ngram_sizes) < 1:
        raise ValueError(f"ngram_sizes must be sizes of at least 1, got {list(ngram_sizes)}")
    hashing = _make_hashing(max(ngram_sizes), seed)
    vectors_ND = np.zeros((len(texts), dimensions), dtype=np.float32)
    for start, stop in _chunks(texts):
        sums_BD = _sketch(*_plain_characters(texts[start:stop]), sorted(set(ngram_sizes)), dimensions, hashing)
        length_B = np.sqrt(np.square(sums_BD).sum(1))
        vectors_ND[start:stop] = sums_BD / np.where(length_B > 0, length_B, 1)[:, None]
    return vectors_ND


class _Hashing(NamedTuple):
    """A random function of n-grams: a sum of characters, each times the number of its place, and a mixing of its bits.

    Attributes:
        multipliers: one per place, odd.
        mixer: odd.
        slot_mixer: makes the slot in which an n-gram is counted independent of its dimension; odd.
    """

    multipliers: NDArray[np.uint64]
    mixer: np.uint64
    slot_mixer: np.uint64


def _make_hashing(longest: int, seed: int) -> _Hashing:
    odd = np.random.SeedSequence(seed).generate_state(longest + 2, np.uint64) | np.uint64(1)
    return _Hashing(odd[2:], odd[0], odd[1])


def _plain_characters(texts: pa.Array) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Returns the characters of the normalized texts, end to end, and where each text begins and the last one ends."""
    import pyarrow as pa
    import pyarrow.compute as pc

    normal = pc.utf8_normalize(pc.fill_null(texts, ""), form="NFKC")
    space, nothing = pa.scalar(" ", normal.type), pa.scalar("", normal.type)
    framed = pc.binary_join_element_wise(space, normal, space, nothing)
    points_C, offsets_N1 = code_points(framed)
    points_C = _folding()[points_C]
    is_kept_C = np.ones(len(points_C), dtype=bool)
    is_kept_C[1:] = (points_C[1:] != 32) | (points_C[:-1] != 32)
    is_kept_C[offsets_N1[:-1]] = True
    num_kept = np.zeros(len(points_C) + 1, dtype=np.int64)
    np.cumsum(is_kept_C, out=num_kept[1:])
    return points_C[is_kept_C].astype(np.uint64), num_kept[offsets_N1]


@functools.cache
def _folding() -> NDArray[np.uint32]:
    """Returns what each character becomes: white space a space, a letter the one that stands for all its cases."""
    folding = np.arange(0x110000, dtype=np.uint32)
    for point in range(_LAST_CASED):
        character = chr(point)
        folded = " " if character.isspace() else character.casefold()
        if len(folded) == 1:
            folding[point] = ord(folded)
    return folding


def _chunks(texts: pa.Array) -> Iterator[tuple[int, int]]:
    """Cuts texts into ranges of about as many bytes; a longer text is a range of its own."""
    import pyarrow.compute as pc

    ends_N = np.cumsum(pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False), dtype=np.int64)
    start = done = 0
    while start < len(ends_N):
        stop = int(np.searchsorted(ends_N, done + _CHUNK_BYTES, side="right"))
        stop = min(max(stop, start + 1), start + _CHUNK_TEXTS)
        yield start, stop
        start, done = stop, int(ends_N[stop - 1])


def _sketch(
    points_C: NDArray[np.uint64],
    offsets_B1: NDArray[np.int64],
    ngram_sizes: Sequence[int],
    dimensions: int,
    hashing: _Hashing,
) -> NDArray[np.float64]:
    """Returns the sums of a chunk of texts, float64, [B, D]."""
    lengths_B = np.diff(offsets_B1)
    num_texts = len(lengths_B)
    # As many slots as the next power of two, so that the first bits of a hash name one.
    slot_bits_B = np.frexp(lengths_B * _SLOTS_PER_CHARACTER - 1)[1].astype(np.int64)
    slots_B = np.cumsum(1 << slot_bits_B)
    slots_C = np.repeat(slots_B - (1 << slot_bits_B), lengths_B)
    shift_C = np.repeat((64 - slot_bits_B).astype(np.uint64), lengths_B)
    # Positive and negative n-grams are summed up apart, at 2 D places per text.
    places_C = np.repeat(np.arange(num_texts) * (2 * dimensions), lengths_B)
    sums = np.zeros(num_texts * 2 * dimensions)
    total_C = np.zeros(len(points_C), dtype=np.uint64)
    for size in range(1, ngram_sizes[-1] + 1):
        num_ngrams = len(points_C) - size + 1
        if num_ngrams < 1:
            break
        # The sum from each character on, over as many as the size.
        total_C = total_C[:num_ngrams] + points_C[size - 1 :] * hashing.multipliers[size - 1]
        if size not in ngram_sizes:
            continue
        hash_C = total_C ^ (total_C >> np.uint64(32))
        hash_C *= hashing.mixer
        slot_C = ((hash_C * hashing.slot_mixer) >> shift_C[:num_ngrams]).view(np.int64) + slots_C[:num_ngrams]
        # What would reach over the end of its text is counted where nothing else is, and weighs nothing.
        over = (offsets_B1[1:, None] - np.arange(1, size)).ravel()
        over = over[(over >= 0) & (over < num_ngrams)]
        slot_C[over] = slots_B[-1]
        count_C = np.bincount(slot_C)[slot_C]
        # Each of c occurrences adds its part of 1 + ln c.
        times = np.arange(1, count_C.max() + 1)
        weight_C = np.concatenate([[0.0], (1 + np.log(times)) / times])[count_C]
        weight_C[over] = 0
        hash_C >>= np.uint64(32)
        hash_C *= np.uint64(2 * dimensions)
        hash_C >>= np.uint64(32)
        sums += np.bincount(hash_C.view(np.int64) + places_C[:num_ngrams], weight_C, len(sums))
    sums_BD: NDArray[np.float64] = np.subtract(*np.moveaxis(sums.reshape(num_texts, dimensions, 2), 2, 0))
    sums_BD[lengths_B == 1] = 0  # nothing but a space
    return sums_BD


class ModelEmbedder:
    """Embeds texts by the mean of a model's last hidden states over the tokens of the text.

    The tokens that a tokenizer adds around a text are seen by the model but not averaged: the state on a begin token
    is the same for all texts, and often very long.

    Attributes:
        model: a transformers model without a head, on the device, float32.
        max_tokens: where a text is cut, with the tokens around it.
        dimensions: D.
    """

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        *,
        device: str | None = None,
        max_tokens: int | None = None,
        tokens_per_batch: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Loads an encoder or a causal language model.

        Args:
            model: a folder, a ``.gguf`` file or the name of a model on the hub; a folder may hold a LoRA adapter.
            tokenizer: what loads the tokenizer; None for the one that lies beside the model.
            device: as torch names it; a GPU where there is one if None.
            max_tokens: 512, or as many as the model takes, if None.
            tokens_per_batch: tokens of a forward pass, more for a single longer text; by the device if None.
            trust_remote_code: let a hub model run its own code.

        Raises:
            ModelError: the model or its tokenizer cannot be loaded, or they do not fit each other.
            ConfigError: a number is out of range.
        """
        import torch

        for name, number in (("max_tokens", max_tokens), ("tokens_per_batch", tokens_per_batch)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = _load_encoder(model, trust_remote_code=trust_remote_code).to(device=place)
        self.max_tokens = _fitting_max_tokens(self.model, model, max_tokens)
        if tokenizer or model.endswith(".gguf"):
            self._encode = _bare_tokens(tokenizer or model, self.model.config, self.max_tokens, trust_remote_code)
        else:
            self._encode = _own_tokens(model, self.max_tokens, trust_remote_code)
        self._name = model
        self._device = place
        self._tokens_per_batch = tokens_per_batch or _TOKENS_PER_BATCH.get(place.type, _TOKENS_PER_BATCH["cpu"])
        try:
            self.dimensions = self._states([_Tokens(np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool))]).shape[1]
        except Exception as error:  # whatever a model's own code raises
            raise ModelError(
                f"model {model}: gives no hidden states ({short_reason(error)}); give an encoder or a causal language "
                "model"
            ) from None

    def embed(self, texts: pa.Array) -> NDArray[np.float32]:
        """Embeds texts.

        A vector does not depend on the texts beside it, but for rounding (1e-5).

        Args:
            texts: N strings; null counts as "".

        Returns:
            The vectors, shape [N, D]; zeros for a text without tokens.

        Raises:
            ModelError: the tokenizer makes ids that the model has no embeddings for.
        """
        tokens = self._encode([text or "" for text in texts.to_pylist()])
        vectors_ND = np.zeros((len(tokens), self.dimensions), dtype=np.float32)
        rows = [row for row, text in enumerate(tokens) if text.is_own_T.any()]
        if not rows:
            return vectors_ND
        largest, num_embeddings = max(int(tokens[row].ids_T.max()) for row in rows), self._num_embeddings()
        if largest >= num_embeddings:
            raise ModelError(
                f"model {self._name}: has {num_embeddings:,} embeddings, but its tokenizer makes id {largest:,}; "
                "give the model's own tokenizer"
            )
        rows.sort(key=lambda row: -len(tokens[row].ids_T))  # if memory is too small, it shows early
        start = 0
        while start < len(rows):
            stop = start + max(1, self._tokens_per_batch // len(tokens[rows[start]].ids_T))
            vectors_ND[rows[start:stop]] = self._states([tokens[row] for row in rows[start:stop]])
            start = stop
        return vectors_ND

    def _num_embeddings(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _states(self, batch: Sequence[_Tokens]) -> NDArray[np.float32]:
        """Returns the mean states of texts of about one length, at length 1."""
        import torch

        lengths_B = np.array([len(text.ids_T) for text in batch])
        is_there_BT = np.arange(lengths_B.max()) < lengths_B[:, None]
        ids_BT = np.zeros(is_there_BT.shape, dtype=np.int64)
        is_own_BT = np.zeros(is_there_BT.shape, dtype=bool)
        ids_BT[is_there_BT] = np.concatenate([text.ids_T for text in batch])
        is_own_BT[is_there_BT] = np.concatenate([text.is_own_T for text in batch])
        with torch.inference_mode():
            ids, mask, is_own = (
                torch.from_numpy(array).to(self._device) for array in (ids_BT, is_there_BT.astype(np.int64), is_own_BT)
            )
            hidden_BTD = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            # Filled, not multiplied: what is under the mask may be no number.
            mean_BD = hidden_BTD.masked_fill(~is_own[..., None], 0).sum(1) / is_own.sum(1, keepdim=True)
            return torch.nn.functional.normalize(mean_BD.float(), dim=1).cpu().numpy()


class _Tokens(NamedTuple):
    """A text as a model reads it: ids, int64, and which are of the text itself."""

    ids_T: NDArray[np.int64]
    is_own_T: NDArray[np.bool_]


def _load_encoder(name: str, *, trust_remote_code: bool) -> Any:
    """Loads a transformers model without its head, in evaluation mode."""
    import torch
    import transformers

    from doremi_mix.adapters import is_adapter_folder
    from doremi_mix.models import load_trained

    if name.endswith(".gguf") or is_adapter_folder(name):
        model = load_trained(Path(name).expanduser(), trust_remote_code=trust_remote_code).model.base_model
    else:
        transformers.utils.logging.disable_progress_bar()
        verbosity = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # a head that is left out is no loss
        path = Path(name).expanduser()
        try:
            model = transformers.AutoModel.from_pretrained(
                str(path) if path.exists() else name, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # damaged files and wrong names come as many classes
            raise ModelError(
                f"model {name}: cannot be loaded ({short_reason(error)}); give the folder of an encoder or of a causal "
                "language model"
            ) from None
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    model.config.use_cache = False
    return model.eval()


def _fitting_max_tokens(model: Any, name: str, max_tokens: int | None) -> int:
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return max_tokens or MAX_TOKENS
    # Some count positions from behind the padding id on.
    limit -= getattr(model.config, "pad_token_id", 0) + 1 if "roberta" in model.config.model_type else 0
    if max_tokens is not None and max_tokens > limit:
        raise ModelError(f"model {name}: takes {limit:,} positions, max_tokens is {max_tokens:,}; set {limit} or less")
    return min(max_tokens or MAX_TOKENS, limit)


def _own_tokens(name: str, max_tokens: int, trust_remote_code: bool) -> Callable[[list[str]], list[_Tokens]]:
    """Returns what encodes texts by the tokenizer beside a model, with the tokens that it puts around a text."""
    from transformers import AutoTokenizer

    path = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if path.exists() else name, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever the tokenizer's class raises
        raise ModelError(
            f"model {name}: gives no tokenizer of its own ({short_reason(error)}); name one beside it"
        ) from None
    tokenizer.split_special_tokens = True  # a text that spells "[SEP]" does not end there

    def encode(texts: list[str]) -> list[_Tokens]:
        if not texts:
            return []
        batch = tokenizer(texts, truncation=True, max_length=max_tokens, return_special_tokens_mask=True)
        return [
            _Tokens(np.array(ids, dtype=np.int64), np.array(special, dtype=np.int64) == 0)
            for ids, special in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True)
        ]

    return encode


def _bare_tokens(
    name: str, config: Any, max_tokens: int, trust_remote_code: bool
) -> Callable[[list[str]], list[_Tokens]]:
    """Returns what encodes texts by a tokenizer that adds nothing, after the begin token if the model has one."""
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    begin_id = getattr(config, "bos_token_id", None)
    begin = [begin_id] if isinstance(begin_id, int) and begin_id in tokenizer.control_ids else []

    def encode(texts: list[str]) -> list[_Tokens]:
        encoded = []
        for text_ids in tokenizer.encode_batch(texts):
            ids_T = np.concatenate([begin, text_ids]).astype(np.int64)[:max_tokens]
            encoded.append(_Tokens(ids_T, np.arange(len(ids_T)) >= len(begin)))
        return encoded

    return encode
