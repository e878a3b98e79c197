"""Baichuan2's tokenizer for every program that reads Hugging Face folders, and a model's tokenizer for an evaluation.

SentencePiece merges two pieces in the order of the scores, which in Baichuan2 is not the order of the ids: the last
25,000 pieces were inserted.  transformers' LlamaTokenizer goes by the ids and gets "Marshall" and " Sylvia" wrong; its
generic class goes by the scores but takes a text that is nothing but ``</s>`` for the control token.  So a converted
folder carries a ``tokenizer.json`` made from the SentencePiece model, which needs no class of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doremi_mix.bpe import without_surrogates
from doremi_mix.errors import ModelError, short_reason
from doremi_mix.tokenizer import Tokenizer, load_tokenizer, looks_like_marker

if TYPE_CHECKING:
    import tokenizers

_MODEL_FILE = "tokenizer.model"
_SPACE = "▁"
"""How SentencePiece writes a space inside a piece."""

_SETTINGS = {
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 4096,
    "pad_token": "<unk>",
    "padding_side": "left",
    "split_special_tokens": True,  # a text that spells a control token is text
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}

# Where tokenizers that should agree are known to part: merges out of order, runs of spaces, spaces that are stripped or
# added, digits, bytes of rare characters, pieces that stand for tags and line breaks.
_PROBES = (
    "Marshall said that Sylvia's livelihoods depend on superficial things, doesn't it?",
    "The quick brown fox jumps over the lazy dog. ",
    "  two spaces before, two  between, two after  ",
    " leading space",
    "今天天气很好，我们去公园散步吧。使用Python编程，共2024年１２月！",
    "混合 的我们 一一对应……《红楼梦》“数据”",
    'def add(a, b):\n    """Adds."""\n\treturn a + b  # 2 + 2 == 4\n\n\n\nprint(add(1, -2.5))\n',
    '<table><tr><td class="x">1</td></tr></table><br/><!-- note --><h2>T</h2>\n',
    '{\'key\': [1, 22, 333, 4444], "url": "https://a.example/b?c=d&e=%20f"}',
    "1234567890 3.14159 1,000,000 -7 10^6 0x1F",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f9ff",
    "tab\there\r\nline\u3000wide\u00a0fixed\u2003em\ufeffmark\u200bzero",
    " ",
    "\n",
    " " * 33 + "\n" * 7 + "\t" * 5 + "-" * 41 + "=" * 19 + "." * 11 + "。" * 8,
    "<0x0A> <0xE7>",
    "Привет, который час? Ünïcödé ñandú العربية हिन्दी ไทย 한국어 日本語テキスト \u1e6e\U00010348",
    "a\ud800b",  # half a character, as some files hold; no library can write it
    "",
)


def copy_tokenizer(source: Path, target: Path, vocab_size: int) -> None:
    """Copies a Baichuan2 tokenizer into the folder of a converted model.

    The SentencePiece model is copied byte for byte.  Beside it come a ``tokenizer.json`` that gives the same ids, which
    is checked on every piece, and a ``tokenizer_config.json``; so ``AutoTokenizer`` needs no remote code.  Nothing is
    added to a text, and no text becomes a control token or reserved marker by spelling it: a program that wants one
    must give its id.

    Args:
        source: the vendor's folder, with ``tokenizer.model``.
        target: the converted model's folder; is made if need be.
        vocab_size: what the model's config.json says, which is the rows of its embeddings.

    Raises:
        ModelError: the file is missing, damaged, of another size than the model, or not of Baichuan2's form.
    """
    path = source / _MODEL_FILE
    content, model = _read_model(path)
    size = model.vocab_size()
    if size != vocab_size:
        raise ModelError(
            f"{path}: has {size:,} pieces, but config.json says vocab_size {vocab_size:,}; take both files from the "
            "same model"
        )
    ids = {"unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id()}
    if ids != {"unk": 0, "bos": 1, "eos": 2}:
        got = ", ".join(f"{role} {id_}" for role, id_ in ids.items())
        raise ModelError(f"{path}: expected the ids unk 0, bos 1, eos 2, got {got}; this is no Baichuan2 tokenizer")
    backend = _backend_of(model)
    differing = _first_difference(_encode_plain(backend), model.encode, _texts_of(model))
    if differing is not None:
        raise ModelError(
            f"{path}: expected a BPE without normalization, added spaces or stripped ones, as Baichuan2's is, got "
            f"other ids for the text {differing!r}; this is no Baichuan2 tokenizer"
        )
    target.mkdir(parents=True, exist_ok=True)
    _write(target / _MODEL_FILE, content)
    _write(target / "tokenizer.json", backend.to_str().encode())
    _write(target / "tokenizer_config.json", (json.dumps(_SETTINGS, indent=2) + "\n").encode())


def load_hf_tokenizer(folder: Path | str) -> Any:
    """Loads the transformers tokenizer of a model for an evaluation, with the ids that training gives to the same text.

    It differs from what ``AutoTokenizer`` loads in this:

    - a text that spells a control token or a marker stays text;
    - a lone surrogate is read as U+FFFD instead of failing;
    - a ``tokenizer.json`` is read as it is written, and a SentencePiece model of Baichuan2's form by itself, whatever
      class the folder names;
    - ids are decoded by SentencePiece where the folder has its model, because transformers loses the whole character
      before a broken one;
    - the end token and the one to pad with are those of ``load_tokenizer``;
    - there is no chat template, because its markers would be taken for text.

    Args:
        folder: of a model with its tokenizer, or what else ``load_tokenizer`` takes, except for GGUF files.

    Returns:
        A ``PreTrainedTokenizerBase``.

    Raises:
        ModelError: there is no tokenizer, transformers cannot load it, it gives other ids than ``load_tokenizer`` to a
            text of a built-in corpus, or it makes a control token of a text that spells one.
    """
    path = Path(folder).expanduser()
    own = load_tokenizer(str(path))
    model = _sentencepiece_of(path, own)
    tokenizer = _load_with_transformers(path, own, model)
    tokenizer.chat_template = None
    # As in training; a folder may leave them out, or name a token to pad with that the model has no embedding for.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(own.end_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own.pad_id)
    if tokenizer.is_fast:
        _make_markers_special(tokenizer, own)
    loaded = type(tokenizer)
    # Named as before, because the name is written into the folder when the tokenizer is saved.
    tokenizer.__class__ = type(loaded.__name__, (_PlainText, loaded), {"__module__": loaded.__module__})
    tokenizer.sentencepiece_model = model
    _check_against(own, tokenizer, str(folder))
    return tokenizer


class _PlainText:
    """What a loaded transformers tokenizer gets, whatever its class: any text can be encoded, and decodes as it was.

    These are the two methods through which all public ones of every class go.  No setting does either thing.
    """

    sentencepiece_model: Any = None

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        return super()._encode_plus(_readable(text), _readable(text_pair), **options)  # type: ignore[misc]

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        model = self.sentencepiece_model
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if model is not None and all(id_ < model.vocab_size() for id_ in ids):
            written = [id_ for id_ in ids if not (model.is_control(id_) or model.is_unknown(id_))]
            if skip_special_tokens or len(written) == len(ids):
                return model.decode(written)
        return super()._decode(ids, skip_special_tokens=skip_special_tokens, **options)  # type: ignore[misc]


def _readable(text: Any) -> Any:
    """Reads lone surrogates as U+FFFD in a text, or in lists of texts."""
    if isinstance(text, str):
        return without_surrogates([text])[0]
    return type(text)(map(_readable, text)) if isinstance(text, (list, tuple)) else text


def _read_model(path: Path) -> tuple[bytes, Any]:
    """Returns a SentencePiece model as bytes and as a processor."""
    import sentencepiece

    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: no such file: expected the SentencePiece model that is published with the weights; fetch it"
        ) from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({short_reason(error)}); fetch it again") from error
    try:
        if content:  # the library takes an empty file for a model without pieces
            return content, sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        pass
    raise ModelError(
        f"{path}: not a SentencePiece model, or only a part of one ({len(content):,} bytes); fetch it again"
    )


def _sentencepiece_of(path: Path, own: Tokenizer) -> Any:
    """Returns the SentencePiece model of a tokenizer; None unless it has one, with just the tokenizer's ids."""
    try:
        _, model = _read_model(path if path.suffix == ".model" else path / _MODEL_FILE)
    except ModelError:  # others use the name too, for files of other kinds
        return None
    return model if model.vocab_size() == own.vocab_size else None


def _backend_of(model: Any) -> tokenizers.Tokenizer:
    """Makes a tokenizer of the tokenizers library that gives a SentencePiece BPE's ids, except for its markers.

    A marker is given as text, as in ``doremi_mix.tokenizer``.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    pieces = [model.id_to_piece(id_) for id_ in range(model.vocab_size())]
    scores = [model.get_score(id_) for id_ in range(len(pieces))]
    silent = {id_ for id_ in range(len(pieces)) if model.is_control(id_) or model.is_unknown(id_)}
    others = [id_ for id_ in range(len(pieces)) if id_ not in silent and not model.is_byte(id_)]
    # The library does not say which pieces are user-defined.  They score zero; of the learned ones only the first does,
    # and its zero is negative.
    defined = [id_ for id_ in others if scores[id_] == 0 and math.copysign(1, scores[id_]) > 0]
    learned = {pieces[id_]: id_ for id_ in sorted({*others} - {*defined})}
    merges = sorted(
        (-scores[id_], id_, piece[:split], piece[split:])
        for piece, id_ in learned.items()
        for split in range(1, len(piece))
        if piece[:split] in learned and piece[split:] in learned
    )
    bpe = models.BPE(
        vocab={piece: id_ for id_, piece in enumerate(pieces)},
        merges=[(left, right) for _, _, left, right in merges],
        unk_token=pieces[model.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {*silent, *(id_ for id_ in defined if looks_like_marker(pieces[id_]))}
    added = [(id_, tokenizers.AddedToken(pieces[id_], normalized=False)) for id_ in sorted({*special, *defined})]
    backend.add_special_tokens([token for id_, token in added if id_ in special])
    backend.add_tokens([token for id_, token in added if id_ not in special])
    backend.encode_special_tokens = True  # as ordinary text, that is
    return backend


def _texts_of(model: Any) -> list[str]:
    """Returns the texts on which another tokenizer must agree with a SentencePiece model: probes and every piece."""
    pieces = [model.id_to_piece(id_).replace(_SPACE, " ") for id_ in range(model.vocab_size())]
    return [*without_surrogates(_PROBES), *(piece for piece in pieces if not looks_like_marker(piece))]


def _encode_plain(backend: tokenizers.Tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _first_difference(
    encode: Callable[[Sequence[str]], Iterable[Sequence[int]]],
    expected: Callable[[Sequence[str]], Iterable[Sequence[int]]],
    texts: Sequence[str],
) -> str | None:
    """Returns the first text to which two tokenizers give other ids; None if they agree."""
    pairs = zip(texts, encode(texts), expected(texts), strict=True)
    return next((text for text, ids, others in pairs if list(ids) != list(others)), None)


def _load_with_transformers(path: Path, own: Tokenizer, model: Any) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (path / "tokenizer.json").is_file() and model is not None:
        backend = _backend_of(model)
        if _first_difference(_encode_plain(backend), model.encode, without_surrogates(_PROBES)) is None:
            roles = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": own.end_id}
            named = {role: model.id_to_piece(id_) for role, id_ in roles.items() if id_ >= 0}
            return PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True, **named)
    try:
        if path.suffix == ".json":
            return PreTrainedTokenizerFast(tokenizer_file=str(path), split_special_tokens=True)
        # Some classes, LlamaTokenizer among them, take only the vocabulary from the file and put their own rules on it.
        loader = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
        return loader.from_pretrained(str(path), split_special_tokens=True, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's class raises
        raise ModelError(
            f"tokenizer {path}: transformers cannot load it ({short_reason(error)}); convert the model to a form that "
            "needs no code of its own"
        ) from error


def _make_markers_special(tokenizer: Any, own: Tokenizer) -> None:
    """Lets the setting that splits special tokens split those markers too that a folder does not declare special."""
    import tokenizers

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    markers = [token for token in content["added_tokens"] if token["id"] in own.control_ids and not token["special"]]
    if markers:
        for token in markers:
            token["special"] = True
        tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))


def _check_against(own: Tokenizer, tokenizer: Any, name: str) -> None:
    """Refuses a transformers tokenizer that gives other ids than ours, or makes a control token of a text."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        batch = tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return batch["input_ids"]  # type: ignore[no-any-return]

    differing = _first_difference(encode, lambda texts: [ids.tolist() for ids in own.encode_batch(texts)], _PROBES)
    if differing is not None:
        raise ModelError(
            f"tokenizer {name}: transformers gives other ids than training does for the text {differing!r}; add a "
            "tokenizer.json that agrees with tokenizer.model, or evaluate another model"
        )
    spelled = [text for literal in own.control_literals if len(literal) > 1 for text in (literal, f"a{literal}b")]
    forbidden = own.control_ids - {own.unknown_id}
    for text, ids in zip(spelled, encode(spelled), strict=True):
        if not forbidden.isdisjoint(ids):
            raise ModelError(
                f"tokenizer {name}: transformers makes a control token of the text {text!r}; declare it a special "
                "token in tokenizer.json, or evaluate another model"
            )


def _write(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
