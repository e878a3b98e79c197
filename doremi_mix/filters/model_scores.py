"""Perplexity and instruction-following difficulty (IFD) of examples, from any causal language model.

Axes: E examples, S sequences to score, B packs in a forward pass, T tokens of a pack, D hidden size, N wanted tokens.

Each loss is that of a text alone; how texts are packed is the business of ``prefix_packs``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import ConfigError, ModelError
from doremi_mix.filters.prefix_packs import (
    Pack,
    ScoredSequence,
    group_packs,
    lay_out,
    plan_packs,
    to_inputs,
    tree_mask,
)
from doremi_mix.filters.texts import example_texts
from doremi_mix.packing import to_offsets
from doremi_mix.presets import PRESETS, is_config_only
from doremi_mix.tokenizer import Tokenizer, load_tokenizer
from doremi_mix.tokens import CONTEST_TEMPLATE, Template, encode_examples, truncate
from doremi_mix.types import Example

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from doremi_mix.models import TokenLossModel

LOSS_COLUMNS = ("text_loss", "answer_loss", "answer_alone_loss")
COUNT_COLUMNS = ("num_text_tokens", "num_answer_tokens")
COLUMNS = (*LOSS_COLUMNS, *COUNT_COLUMNS)

Reading = Literal["loss_ratio", "perplexity_ratio"]
READINGS: tuple[Reading, ...] = ("loss_ratio", "perplexity_ratio")

MAX_TOKENS = 1024
"""Where texts are cut unless told otherwise: the contest's cutoff."""

# Attention compares all pairs of a pack, so a pack of short sequences should not be long; the beginnings that its
# sequences share are computed once a pack, so it should not be short.
PACK_TOKENS = 256
_TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16_384}


def derive(columns: Mapping[str, NDArray[Any]], reading: Reading) -> dict[str, NDArray[np.float32]]:
    """Turns losses into what thresholds are set on.

    With a = ``answer_loss`` and b = ``answer_alone_loss``, in nats per token::

        perplexity        = exp(text_loss)
        answer_perplexity = exp(a)
        ifd               = a / b           loss_ratio
                          = exp(a - b)      perplexity_ratio

    Both readings are 1 where the instruction does not help, and smaller the more it does, but they are no functions of
    one another: where the answer alone has 2 nats, a loss ratio of 0.9 is a perplexity ratio of 0.82, and where it has
    4 nats, of 0.67.  So a threshold belongs to its reading.

    The code that the authors of IFD published with their paper divides mean losses, and so does Data-Juicer; the
    authors' later Superfiltering divides perplexities.  Which of the two the range of 0.2 to 0.9 of Ke-Data-Juicer
    belongs to is not published.

    Args:
        columns: what ``ModelScorer.score`` returned, or some of it.
        reading: how ``ifd`` is computed.

    Returns:
        Those of perplexity, answer_perplexity and ifd whose losses are there, float32, shape [E]; NaN where a loss is,
        infinite from 3.4e38.

    Raises:
        ValueError: there is no such reading.

    Example:
        >>> columns = {"answer_loss": np.float32([1.5, np.nan]), "answer_alone_loss": np.float32([2.0, 2.0])}
        >>> [round(float(derive(columns, reading)["ifd"][0]), 4) for reading in READINGS]
        [0.75, 0.6065]

    Reference:
        https://arxiv.org/abs/2308.12032.
    """
    if reading not in READINGS:
        raise ValueError(f"reading must be {' or '.join(READINGS)}, got {reading!r}")
    losses = {name: columns[name].astype(np.float64) for name in LOSS_COLUMNS if name in columns}
    derived = {}
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if "text_loss" in losses:
            derived["perplexity"] = np.exp(losses["text_loss"])
        if "answer_loss" in losses:
            derived["answer_perplexity"] = np.exp(losses["answer_loss"])
        if {"answer_loss", "answer_alone_loss"} <= losses.keys():
            given, alone = losses["answer_loss"], losses["answer_alone_loss"]
            derived["ifd"] = given / alone if reading == "loss_ratio" else np.exp(given - alone)
        return {name: values.astype(np.float32) for name, values in derived.items()}


class ModelScorer:
    """A causal language model that scores examples.

    A *start token* stands where something must predict the first token: the model's begin token where it names one,
    and the tokenizer's end token otherwise.  No loss is taken on it, and it is not counted.

    Attributes:
        model: on the device.
        tokenizer: of the texts.
        max_tokens: where a text, or a prompt with its answer, is cut.
        start_id: the start token.
        begins: whether the model has a begin token, which then precedes prompts, too.  A model without one saw
            documents that begin with their own first token.
    """

    def __init__(
        self,
        model: str,
        tokenizer: str | Tokenizer | None = None,
        *,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_tokens: int | None = None,
        template: Template = CONTEST_TEMPLATE,
        tokens_per_batch: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Loads the model and checks that it computes packs right.

        Args:
            model: a folder, a ``.gguf`` file or the name of a model on the hub; a folder may hold a LoRA adapter.
            tokenizer: the same, or one that is loaded; by default the model's own.
            device: as torch names it; a GPU where there is one if None.
            dtype: of weights and hidden states; float32 unless asked for.
            max_tokens: from 2; 1,024, or as many as the model takes, if None.
            template: of the prompts.
            tokens_per_batch: tokens of a forward pass, more for a single longer text; by the device if None.
            trust_remote_code: let a hub model run its own code.

        Raises:
            ModelError: the model or its tokenizer cannot be loaded, they do not fit each other, or the model cannot
                compute packs.
            ConfigError: a number or a name is out of range.
        """
        import torch

        for name, number, least in (("max_tokens", max_tokens, 2), ("tokens_per_batch", tokens_per_batch, 1)):
            if number is not None and number < least:
                raise ConfigError(f"{name} must be at least {least}, got {number}")
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {dtype!r}")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = _load_tokenizer(model, tokenizer, trust_remote_code=trust_remote_code)
        self.tokenizer = tokenizer
        loaded = _load_model(model, kind, trust_remote_code=trust_remote_code)
        _check_fit(loaded, model, self.tokenizer)
        self.max_tokens = _fitting_max_tokens(loaded, model, max_tokens)
        self.model: TokenLossModel = loaded.to(device=place, dtype=kind)
        begin_id = _begin_id(loaded, self.tokenizer)
        self.begins = begin_id is not None
        self.start_id = self.tokenizer.end_id if begin_id is None else begin_id
        self._template = template
        self._device = place
        self._tokens_per_batch = tokens_per_batch or _TOKENS_PER_BATCH.get(place.type, _TOKENS_PER_BATCH["cpu"])

    def score(
        self,
        batch: pa.RecordBatch,
        columns: Collection[str] = COLUMNS,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Computes losses in nats per token.

        * ``text_loss``: the mean over the tokens of the example's text (see ``texts.example_texts``) after the start
          token.
        * ``answer_loss``: the mean over the tokens of the output, given the template's prompt with the instruction, its
          input, the system prompt and earlier turns.  The end token is no part of the answer, as in the code of the
          paper.
        * ``answer_alone_loss``: the mean over the same tokens after the start token alone (the code of the paper leaves
          the template's last words, "### Response:", before them).
        * ``num_text_tokens``, ``num_answer_tokens``: how many tokens these means are over.

        What is longer than ``max_tokens`` is cut: a text keeps its start, a prompt and its answer (with the end token)
        are cut in proportion as ``tokens.truncate`` does; earlier turns count as prompt.

        A row's numbers do not depend on the rows beside it, but for rounding (1e-5 in float32).

        Args:
            batch: examples with the columns instruction, input, output, and system and history if there are any.  The
                more of one domain, the more beginnings are shared.
            columns: which to compute; only the passes that they need are made.
            progress: is told how many tokens are done, and of how many, after each forward pass.

        Returns:
            The columns, shape [E]: losses float32, NaN where there is no token to take one on (plain text has no
            answer); counts int32.

        Raises:
            ValueError: a column is unknown.
        """
        unknown = [name for name in columns if name not in COLUMNS]
        if unknown:
            raise ValueError(f"unknown column {unknown[0]!r}; expected {', '.join(COLUMNS)}")
        wanted: dict[str, list[ScoredSequence]] = {}
        counts: dict[str, NDArray[np.int32]] = {}
        if not {"text_loss", "num_text_tokens"}.isdisjoint(columns):
            wanted["text_loss"] = self._texts(batch)
            counts["num_text_tokens"] = _num_scored(wanted["text_loss"], batch.num_rows)
        if not {"answer_loss", "answer_alone_loss", "num_answer_tokens"}.isdisjoint(columns):
            wanted["answer_loss"], wanted["answer_alone_loss"] = self._answers(batch)
            counts["num_answer_tokens"] = _num_scored(wanted["answer_loss"], batch.num_rows)
        losses = {name: np.full(batch.num_rows, np.nan, dtype=np.float32) for name in wanted if name in columns}
        sequences = [(name, sequence) for name in losses for sequence in wanted[name]]
        means_S = self._mean_losses([sequence for _, sequence in sequences], progress)
        for (name, sequence), mean in zip(sequences, means_S.tolist(), strict=True):
            losses[name][sequence.row] = mean
        return {name: values for name, values in (losses | counts).items() if name in columns}

    def _texts(self, batch: pa.RecordBatch) -> list[ScoredSequence]:
        """Returns the plain text of each row, but for empty ones."""
        ids_N, lengths_E = self.tokenizer.encode_flat(example_texts(batch).to_pylist())
        starts_E = to_offsets(lengths_E)
        start = np.array([self.start_id], dtype=np.uint32)
        sequences = []
        for row in np.flatnonzero(lengths_E).tolist():
            ids = ids_N[starts_E[row] : min(starts_E[row + 1], starts_E[row] + self.max_tokens)]
            sequences.append(ScoredSequence(row, np.concatenate([start, ids]), 1))
        return sequences

    def _answers(self, batch: pa.RecordBatch) -> tuple[list[ScoredSequence], list[ScoredSequence]]:
        """Returns the answer of each row, after its prompt and alone; none where there is no prompt or no answer."""
        examples, rows = _examples(batch)
        encoded = encode_examples(examples, self.tokenizer, self._template)
        # The last answer is what counts, and all before it is its prompt.
        responses = encoded.turn_lengths[encoded.turn_offsets[1:] - 1, 1]
        lengths_E2 = np.stack([encoded.lengths - responses, responses], axis=1)
        cut = truncate(
            replace(encoded, turn_lengths=lengths_E2, turn_offsets=np.arange(len(rows) + 1)), self.max_tokens
        )
        start = np.array([self.start_id], dtype=np.uint32)
        given, alone = [], []
        for e, row in enumerate(rows):
            num_prompt, num_response = cut.turn_lengths[e].tolist()
            num_answer = num_response - (num_response == responses[e])  # without the end token, if it was not cut off
            if not num_answer:
                continue
            ids = cut.token_ids[cut.offsets[e] : cut.offsets[e] + num_prompt + num_answer]
            whole = np.concatenate([start, ids]) if self.begins or not num_prompt else ids
            given.append(ScoredSequence(row, whole, len(whole) - num_answer))
            alone.append(ScoredSequence(row, np.concatenate([start, ids[num_prompt:]]), 1))
        return given, alone

    def _mean_losses(
        self, sequences: Sequence[ScoredSequence], progress: Callable[[int, int], None] | None
    ) -> NDArray[np.float64]:
        """Returns the mean loss of each sequence, shape [S]."""
        means_S = np.full(len(sequences), np.nan)
        capacity = min(PACK_TOKENS, self._tokens_per_batch)
        plans = plan_packs([sequence.ids for sequence in sequences], capacity)
        packs = [lay_out(sequences, plan) for plan in plans]
        total, done = sum(len(pack.input_ids_T) for pack in packs), 0
        for group in group_packs(packs, self._tokens_per_batch):
            for pack, losses_N in zip(group, self._losses(group), strict=True):
                for sequence_id, where in pack.scored:
                    means_S[sequence_id] = losses_N[where].mean(dtype=np.float64)
                done += len(pack.input_ids_T)
            if progress is not None:
                progress(done, total)
        return means_S

    def _losses(self, packs: Sequence[Pack]) -> list[NDArray[np.float32]]:
        """Returns the wanted losses of each pack, shape [N], from one forward pass."""
        import torch

        from doremi_mix.loss import linear_cross_entropy

        inputs = to_inputs(packs)
        with torch.inference_mode():
            hidden_BTD = self.model.model.base_model(
                input_ids=self._tensor(inputs.input_ids_BT),
                position_ids=self._tensor(inputs.positions_BT),
                attention_mask=None if inputs.ends_BT is None else tree_mask(self._tensor(inputs.ends_BT)),
                use_cache=False,
            ).last_hidden_state
            # Most prompt tokens need no logits, and a token with several children needs one row for each.
            hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, self._tensor(inputs.from_N))
            head_VD = self.model.model.get_output_embeddings().weight
            loss_1N = linear_cross_entropy(hidden_ND[None], head_VD, self._tensor(inputs.labels_N)[None])
            losses = loss_1N[0].float().cpu().numpy()
        return np.split(losses, np.cumsum([len(pack.labels_N) for pack in packs])[:-1])

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        import torch

        return torch.from_numpy(array).to(self._device)


def _num_scored(sequences: Sequence[ScoredSequence], num_rows: int) -> NDArray[np.int32]:
    counts = np.zeros(num_rows, dtype=np.int32)
    for sequence in sequences:
        counts[sequence.row] = len(sequence.ids) - sequence.first
    return counts


def _examples(batch: pa.RecordBatch) -> tuple[list[Example], list[int]]:
    """Returns the rows that have a prompt and an answer."""
    names = ("instruction", "input", "output", "system", "history")
    columns = {name: batch.column(name).to_pylist() for name in names if name in batch.schema.names}
    nothing = [None] * batch.num_rows
    examples, rows = [], []
    for row, values in enumerate(zip(*(columns.get(name, nothing) for name in names), strict=True)):
        instruction, given, output, system, history = values
        if instruction is None or not output:
            continue
        turns = tuple((turn["user"] or "", turn["assistant"] or "") for turn in history or ())
        examples.append(Example("", "", instruction, given or "", output, turns, system or ""))
        rows.append(row)
    return examples, rows


def _load_tokenizer(model: str, name: str | None, *, trust_remote_code: bool) -> Tokenizer:
    try:
        return load_tokenizer(name or model, trust_remote_code=trust_remote_code)
    except ModelError as error:
        if name:
            raise
        raise ModelError(f"model {model}: gives no tokenizer of its own; name one beside it ({error})") from None


def _load_model(name: str, dtype: Any, *, trust_remote_code: bool) -> TokenLossModel:
    """Loads a model, which checks that its loss and its packs are right."""
    from doremi_mix.adapters import is_adapter_folder
    from doremi_mix.models import TokenInfo, build_model, load_trained

    if name in PRESETS or is_config_only(name):
        raise ModelError(
            f"model {name}: starts from random weights, whose losses say nothing about a text; give a trained model: "
            "a folder, a .gguf file or a name on the hub"
        )
    if is_adapter_folder(name):
        return load_trained(Path(name).expanduser(), trust_remote_code=trust_remote_code, base_dtype=dtype)
    # Sizes are checked below: here it is other settings that must fit.
    nothing = TokenInfo(vocab_size=0, end_id=0, pad_id=0)
    return build_model(name, nothing, context_length=16, seed=0, trust_remote_code=trust_remote_code)


def _check_fit(model: TokenLossModel, name: str, tokenizer: Tokenizer) -> None:
    num_embeddings = model.model.get_input_embeddings().weight.shape[0]
    if num_embeddings < tokenizer.vocab_size:
        raise ModelError(
            f"model {name}: has {num_embeddings:,} embeddings, but tokenizer {tokenizer.name} makes ids up to "
            f"{tokenizer.vocab_size - 1:,}; give the model's own tokenizer"
        )


def _fitting_max_tokens(model: TokenLossModel, name: str, max_tokens: int | None) -> int:
    limit = getattr(model.model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return max_tokens or MAX_TOKENS
    if max_tokens is not None and max_tokens > limit:
        raise ModelError(f"model {name}: takes {limit:,} positions, max_tokens is {max_tokens:,}; set {limit} or less")
    return min(max_tokens or MAX_TOKENS, limit)


def _begin_id(model: TokenLossModel, tokenizer: Tokenizer) -> int | None:
    """Returns the begin token that the model's configuration names; None if there is none that its tokenizer knows."""
    begin_id = getattr(model.model.config, "bos_token_id", None)
    return begin_id if isinstance(begin_id, int) and begin_id in tokenizer.control_ids else None
