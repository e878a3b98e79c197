"""A tokenizer is a function from texts to ids whose output never holds a control token.

Four kinds are read: Hugging Face ``tokenizer.json`` files, bare SentencePiece models, the tokenizers inside GGUF files,
and whatever else transformers can load.  They end as one concrete class, because the pipeline asks only one thing of
them.

Nothing heavy is imported at the top: tokenizers, sentencepiece and transformers load in the functions that use them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.bpe import END_TOKEN, PAD_TOKEN, without_surrogates
from doremi_mix.errors import ModelError, short_reason

if TYPE_CHECKING:
    import tokenizers

# What the publishers of tokenizers call the end of a document, for files that do not say which of their tokens it is.
_USUAL_END_TOKENS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>"),
    END_TOKEN,
)

# A token that a person might type but only a program should write: <|im_start|>, <reserved_106>, [INST], <<SYS>>.
# Byte pieces (<0x0A>), comments (<!--) and the tags of HTML are text.
_MARKER = re.compile(r"<+(?!!|/?0x[0-9A-Fa-f]{2}>)[^<>\s]*[^\W\d][^<>\s]*>+|\[[^\[\]\s]*[^\W\d][^\[\]\s]*\]")
_HTML_TAG = re.compile(r"</?([A-Za-z][A-Za-z0-9]*)/?>")
_HTML_NAMES = re.compile(  # not "s": struck-out text to a browser, the start of a text to a model
    r"a|abbr|address|article|aside|audio|b|blockquote|body|br|button|canvas|caption|center|cite|code|col|dd|del|details|"
    r"div|dl|dt|em|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|label|li|"
    r"link|main|mark|math|meta|nav|ol|option|p|pre|q|samp|script|section|select|small|span|strong|style|sub|summary|"
    r"sup|svg|table|tbody|td|textarea|tfoot|th|thead|time|title|tr|u|ul|var|video",
    re.IGNORECASE,
)

# The files that decide a folder's ids; a chat template or a generation config does not.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Turns texts into ids; no begin or end token is added, and no text can become a control token.

    Attributes:
        name: the file, folder or hub name that it was loaded from.
        sha256: digest of the tokenizer's own files.
        vocab_size: one more than the largest id.
        end_id: the token that ends a response or a document.
        pad_id: what fills the rest of a sequence; its loss is masked.
        control_ids: ids with a meaning that text must not carry, ``end_id`` included.
        unknown_id: what text outside the vocabulary becomes; ``None`` if any text can be written.
        encode_raw: texts to lists of ids, by the library underneath.
        control_literals: the spellings of the control tokens.
    """

    name: str
    sha256: str
    vocab_size: int
    end_id: int
    pad_id: int
    control_ids: frozenset[int]
    unknown_id: int | None
    encode_raw: Callable[[Sequence[str]], Sequence[Sequence[int]]] = field(repr=False, compare=False)
    control_literals: tuple[str, ...] = field(repr=False, compare=False)
    _is_forbidden: NDArray[np.bool_] = field(init=False, repr=False, compare=False)
    _literal_pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        forbidden = np.zeros(self.vocab_size, dtype=bool)
        forbidden[list(self.control_ids)] = True
        if self.unknown_id is not None and self.unknown_id != self.end_id:
            forbidden[self.unknown_id] = False  # the only honest id for text that the vocabulary cannot write
        longest_first = sorted((text for text in self.control_literals if len(text) > 1), key=lambda text: -len(text))
        object.__setattr__(self, "_is_forbidden", forbidden)
        object.__setattr__(self, "_literal_pattern", re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"))

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Encodes texts into one array.

        A lone surrogate, which no encoding of Unicode can write, is read as U+FFFD.  Where the library underneath would
        turn a spelled-out control token into its id, the text is encoded in pieces that are cut inside the spelling.

        Args:
            texts: any number of texts, of any length.

        Returns:
            The ids of all texts one after the other, shape [N], and the number of ids of each text, shape [len(texts)].
        """
        texts = without_surrogates(texts)
        ids_by_text = self.encode_raw(texts) if texts else []
        ids_N, lengths = _flatten(ids_by_text)
        forbidden_N = self._is_forbidden[ids_N]
        if not forbidden_N.any():
            return ids_N, lengths
        repaired = list(ids_by_text)
        for index in np.unique(np.repeat(np.arange(len(texts)), lengths)[forbidden_N]):
            repaired[index] = self._encode_in_pieces(texts[index])
        return _flatten(repaired)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Returns the ids of each text, as ``encode_flat`` gives them."""
        ids_N, lengths = self.encode_flat(texts)
        ends = np.cumsum(lengths).tolist()
        return [ids_N[start:end] for start, end in itertools.pairwise([0, *ends])]

    def _encode_in_pieces(self, text: str) -> list[int]:
        """Encodes a text that the library underneath would give a control token."""
        cuts = [match.start() + 1 for match in self._literal_pattern.finditer(text)]
        if not cuts and len(text) > 1:
            cuts = [len(text) // 2]  # the library spells the token in another way, for example after normalization
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
        ids: list[int] = []
        for piece, piece_ids in zip(pieces, self.encode_raw(pieces), strict=True):
            if not self._is_forbidden[piece_ids].any():
                ids.extend(piece_ids)
            elif len(text) == 1:
                ids.extend(token for token in piece_ids if not self._is_forbidden[token])  # nothing else can write it
            else:
                ids.extend(self._encode_in_pieces(piece))
        return ids


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Loads a tokenizer from a file, a folder or the Hugging Face hub.

    A ``tokenizer.json`` is read as it is written; a folder without one but with a ``tokenizer.model``, and a bare
    ``.model`` file, are read by SentencePiece itself and give its ids; any other folder, and a ``.gguf`` file, goes
    through transformers.
    From the hub, the tokenizer's files are fetched and read in the same way.

    Args:
        name_or_path: a folder, a ``tokenizer.json`` file, a SentencePiece ``.model`` file, a ``.gguf`` file or a hub
            name.
        trust_remote_code: let transformers run code that comes with the tokenizer.

    Raises:
        ModelError: there is no such tokenizer, it cannot be read, or it names no end token.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        path = _fetch(name_or_path, trust_remote_code=trust_remote_code)
        return _load_folder(path, name_or_path, trust_remote_code=trust_remote_code)
    name = path.name or path.resolve().name
    if path.is_dir():
        return _load_folder(path, name, trust_remote_code=trust_remote_code)
    if path.suffix == ".json":
        return _load_json(path, name)
    if path.suffix == ".model":
        return _load_sentencepiece(path, name, settings={}, files=[path])
    if path.suffix == ".gguf":
        return _load_gguf(path, name)
    raise ModelError(
        f"tokenizer {name_or_path}: expected a folder, a tokenizer.json, a SentencePiece .model or a .gguf file, got a "
        f'file ending in "{path.suffix}"; give the path of one of these'
    )


def looks_like_marker(text: str) -> bool:
    """Says whether an added token is a marker, such as ``<|user|>`` or ``[INST]``, and not a word, a tag or space.

    Example:
        >>> [text for text in ("<reserved_106>", "[SEP]", "<s>", "</td>", "   ", "...") if looks_like_marker(text)]
        ['<reserved_106>', '[SEP]', '<s>']
    """
    html = _HTML_TAG.fullmatch(text)
    return bool(_MARKER.fullmatch(text)) and not (html and _HTML_NAMES.fullmatch(html[1]))


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a folder that decide what ids a text gets."""
    return [folder / file for file in _TOKENIZER_FILES if (folder / file).is_file()]


def _load_folder(path: Path, name: str, *, trust_remote_code: bool) -> Tokenizer:
    if (path / "tokenizer.json").is_file():
        return _load_json(path / "tokenizer.json", name)
    files = tokenizer_files(path)
    if (path / "tokenizer.model").is_file():
        return _load_sentencepiece(path / "tokenizer.model", name, settings=_read_settings(path), files=files)
    return _load_with_transformers(path, name, files, trust_remote_code=trust_remote_code)


def _load_json(path: Path, name: str) -> Tokenizer:
    """Reads a ``tokenizer.json``, and the settings that lie beside it when there are any."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ModelError(
            f"tokenizer {path}: not a tokenizer.json of the tokenizers library ({short_reason(error)}); "
            f"choose another tokenizer"
        ) from error
    settings = _read_settings(path.parent)
    files = [path.parent / file for file in _TOKENIZER_FILES if file.endswith(("config.json", "map.json"))]
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    vocabulary_unknown = model.get("unk_token")
    if vocabulary_unknown is None and isinstance(
        model.get("unk_id"), int
    ):  # a Unigram model lists [piece, score] pairs
        vocabulary_unknown = model["vocab"][model["unk_id"]][0]
    settings.setdefault("unk_token", vocabulary_unknown)
    return _from_backend(backend, name, settings, _digest([path, *(file for file in files if file.is_file())]))


def _from_backend(backend: tokenizers.Tokenizer, name: str, settings: dict[str, Any], sha256: str) -> Tokenizer:
    """Wraps a tokenizer of the tokenizers library, in which special tokens are no longer read from text."""
    backend.encode_special_tokens = True  # as ordinary text, that is
    backend.no_truncation()
    backend.no_padding()

    end = _token_text(settings, "eos_token") or next(
        (text for text in _USUAL_END_TOKENS if backend.token_to_id(text) is not None), None
    )
    end_id = None if end is None else backend.token_to_id(end)
    if end_id is None:
        raise _no_end_token(name, end)
    names = {role: _token_text(settings, f"{role}_token") for role in ("bos", "unk", "pad")}
    ids = {role: None if text is None else backend.token_to_id(text) for role, text in names.items()}
    pad_id = next(id_ for id_ in (ids["pad"], backend.token_to_id(PAD_TOKEN), ids["unk"], end_id) if id_ is not None)
    added = backend.get_added_tokens_decoder()
    control = {id_: token.content for id_, token in added.items() if _is_control(token)}
    for id_ in (end_id, pad_id, *ids.values()):
        if id_ is not None:
            control[id_] = str(backend.id_to_token(id_))

    def encode_raw(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(
        name=name,
        sha256=sha256,
        vocab_size=1 + max(backend.get_vocab(with_added_tokens=True).values()),
        end_id=end_id,
        pad_id=pad_id,
        control_ids=frozenset(control),
        unknown_id=ids["unk"],
        encode_raw=encode_raw,
        control_literals=tuple(control.values()),
    )


def _load_sentencepiece(path: Path, name: str, settings: dict[str, Any], files: Sequence[Path]) -> Tokenizer:
    """Reads a SentencePiece model with its own library, whose ids are the ones that the model was trained with."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ModelError(f"tokenizer {path}: not a SentencePiece model; choose another tokenizer") from error
    pieces = [model.id_to_piece(id_) for id_ in range(model.vocab_size())]
    # The library does not tell user-defined pieces from learned ones, but only the former have a score of zero (and the
    # first merge of a BPE, which is never a marker).
    control = {
        id_: piece
        for id_, piece in enumerate(pieces)
        if model.is_control(id_)
        or model.is_unknown(id_)
        or (model.get_score(id_) == 0.0 and not model.is_byte(id_) and looks_like_marker(piece))
    }
    ids_by_piece = {piece: id_ for id_, piece in control.items()}
    end = _token_text(settings, "eos_token")
    end_id = ids_by_piece.get(end) if end is not None else (model.eos_id() if model.eos_id() >= 0 else None)
    if end_id is None:
        raise _no_end_token(name, end)
    pad_id: int = ids_by_piece.get(_token_text(settings, "pad_token") or "", model.pad_id())

    def encode_raw(texts: Sequence[str]) -> list[list[int]]:
        return model.encode(texts, out_type=int)  # type: ignore[no-any-return]

    return Tokenizer(
        name=name,
        sha256=_digest(files),
        vocab_size=len(pieces),
        end_id=end_id,
        pad_id=pad_id if pad_id >= 0 else model.unk_id(),
        control_ids=frozenset(control),
        unknown_id=model.unk_id(),
        encode_raw=encode_raw,
        control_literals=tuple(control.values()),
    )


def _load_with_transformers(path: Path, name: str, files: Sequence[Path], *, trust_remote_code: bool) -> Tokenizer:
    """Loads a folder whose vocabulary is in a form of its own, such as ``vocab.json`` with ``merges.txt``."""
    from transformers import AutoTokenizer

    if not files:
        raise ModelError(
            f"tokenizer {path}: the folder holds no tokenizer; expected tokenizer.json, tokenizer.model or vocab.json; "
            f"give a folder with one of these, or leave the tokenizer out to train one on the data"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the tokenizer's class raises
        hint = (
            "choose another tokenizer" if trust_remote_code else "if it needs its own code, set trust_remote_code: true"
        )
        raise ModelError(f"tokenizer {path}: transformers cannot load it ({short_reason(error)}); {hint}") from error
    if getattr(tokenizer, "is_fast", False):
        return _from_backend(tokenizer.backend_tokenizer, name, _special_tokens(tokenizer), _digest(files))
    if tokenizer.eos_token_id is None:
        raise _no_end_token(name, None)
    control = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    control |= {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items() if _is_control(token)}

    def encode_raw(texts: Sequence[str]) -> list[list[int]]:
        batch = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return batch["input_ids"]  # type: ignore[no-any-return]

    return Tokenizer(
        name=name,
        sha256=_digest(files),
        vocab_size=1 + max(tokenizer.get_vocab().values()),
        end_id=tokenizer.eos_token_id,
        pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        control_ids=frozenset(control),
        unknown_id=tokenizer.unk_token_id,
        encode_raw=encode_raw,
        control_literals=tuple(control.values()),
    )


def _load_gguf(path: Path, name: str) -> Tokenizer:
    """Reads the tokenizer that a GGUF file carries beside the weights."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"tokenizer {path}: reading it needs the package gguf, which is not installed; "
            "run: pip install 'doremi-mix[gguf]'"
        )
    import tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # damaged files come as many classes
        raise ModelError(
            f"tokenizer {path}: transformers cannot read it ({short_reason(error)}); choose another tokenizer"
        ) from error
    # transformers gives it special tokens that the file has not, and the model no embeddings for.
    own = set(backend.get_vocab(with_added_tokens=False).values())
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] in own]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    return _from_backend(backend, name, _special_tokens(tokenizer), _digest([path]))


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """Returns the spellings of the special tokens of a transformers tokenizer."""
    return {role: getattr(tokenizer, role, None) for role in ("eos_token", "bos_token", "unk_token", "pad_token")}


def _fetch(name: str, *, trust_remote_code: bool) -> Path:
    """Fetches the files of a tokenizer on the hub, or finds them in the cache."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"tokenizer {name}: no such file or folder; give an existing path or a Hugging Face hub name")
    from huggingface_hub import snapshot_download

    patterns = [*_TOKENIZER_FILES, "config.json", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, gated, misspelled: many classes, all the user's to settle
        raise ModelError(
            f"tokenizer {name}: no such file or folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}); check the name and the connection, or give a local path"
        ) from error


def _read_settings(folder: Path) -> dict[str, Any]:
    """Returns the names of the special tokens from the Hugging Face settings in a folder; {} without any."""
    settings: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter has the last word
        path = folder / file
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path}: not valid JSON; fetch the tokenizer's files again") from error
        settings |= {key: value for key, value in content.items() if key.endswith("_token") and value is not None}
    return settings


def _token_text(settings: dict[str, Any], key: str) -> str | None:
    """Returns the spelling of a special token, which the settings give as a string or as an object."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return None if value is None else str(value)


def _is_control(token: Any) -> bool:
    return bool(token.special) or looks_like_marker(token.content)


def _no_end_token(name: str, named: str | None) -> ModelError:
    got = "none is named" if named is None else f'"{named}" is not in its vocabulary'
    return ModelError(
        f"tokenizer {name}: no end token: expected one to end each response with, got none ({got}); set eos_token in "
        f"its tokenizer_config.json to one of its special tokens, or choose another tokenizer"
    )


def _digest(files: Sequence[Path]) -> str:
    """Returns the sha256 of one file, or for several the sha256 of the list that ``sha256sum`` would print."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    lines = sorted(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _flatten(ids_by_text: Sequence[Sequence[int]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    lengths = np.fromiter(map(len, ids_by_text), dtype=np.int64, count=len(ids_by_text))
    flat = itertools.chain.from_iterable(ids_by_text)
    return np.fromiter(flat, dtype=np.uint32, count=int(lengths.sum())), lengths
