r"""Rows whose answer is no answer: placeholders, refusals, broken turns, copies of the instruction; URLs, tags, sums.

Each function takes Arrow columns of B strings, none of them null, and gives an array of B values.  The expressions are
RE2's, where ``\d``, ``\s`` and ``\b`` mean ASCII: whitespace of other scripts is spelled out where it matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from doremi_mix.filters.texts import utf8_bytes

if TYPE_CHECKING:
    import pyarrow as pa

Mask = NDArray[np.bool_]

# All that str.isspace() holds for, and the byte order mark.
_WHITESPACE = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_SPACE = rf"[{_WHITESPACE}]*"

_PLACEHOLDER = (
    rf"(?i)^{_SPACE}[<\[({{（【《]?{_SPACE}(?:"
    r"no[ _-]?(?:input|output|answer|response)(?: (?:is )?(?:given|needed|required|provided|available|necessary))?"
    r"|none|null|nan|n/a|n\.a\.?|tbd|todo|placeholder|input|output"
    r"|无|無|暂无|不适用|[无無][输輸][入出]|无内容|无答案|没有输[入出]|[输輸][入出]|略|\.\.\.|…+"
    rf"){_SPACE}[>\])}}）】》]?{_SPACE}[.。:：]?{_SPACE}$"
)
_NO_INPUT_TOKEN = r"(?i)<\s*/?no[ _-]?(?:input|output)\s*/?>"

_SORRY = (
    r"(?:(?:i['’]?m |i am )?(?:very |so |really |truly )?sorry|i apologi[sz]e|(?:my )?apologies|unfortunately)"
    r"[,.!;:]? ?(?:but |however,? )?"
)
_UNABLE = (
    r"(?:i|we)(?: can ?not| can['’]?t| am not able to| am unable to|['’]m not able to|['’]m unable to"
    r"| won['’]t be able to| will not be able to| am not programmed to| do not have the ability to)(?: directly)?"
)
_TASK = (
    r"(?:assist|help (?:you )?with (?:that|this)|comply|fulfill?|provide|generate|answer|access|browse|complete"
    r"|respond to|process|perform|execute|engage in|produce|display|render|draw|play|open|view|translate"
    r"|create (?:an? |any )?(?:image|picture|visual|audio|video|drawing))\b"
)
_MODEL = (
    r"(?:(?:large |ai )?language model|(?:ai|artificial intelligence|machine learning)(?: language)? "
    r"(?:model|assistant|chatbot|bot|program|system)|gpt(?: model)?|chatbot|(?:ai|artificial intelligence)"
    r"(?:[,.;:!]| and i\b| i\b| trained\b| developed\b| created\b|$))"
)
_ZH_SORRY = r"(?:非常|很|十分|真的|实在)?(?:抱歉|对不起|不好意思|遗憾)"
_ZH_UNABLE = r"(?:无法|不能|没法|没有办法|没办法)"
_ZH_TASK = (
    r"(?:回答|提供|完成|执行|访问|浏览|生成|创[建作]|播放|处理|理解|识别|判断|确定|推断|获取|查看|满足|协助|显示|绘制)"
)
_ZH_MODEL = r"(?:ai|人工智能|语言模型|聊天机器人|智能助[手理])"
# What an answer begins with if it is a refusal or a disclaimer.  Somebody sorry to hear something, an apology in a
# letter, and somebody in a story who cannot do something are neither.
_REFUSAL = (
    rf"(?i)^{_SPACE}[\"'“‘*]*(?:"
    rf"(?:{_SORRY})?(?:as|being|since i am|since i['’]m|i am|i['’]m)(?: just| only| merely)? an? {_MODEL}"
    rf"|{_SORRY}{_UNABLE} {_TASK}"
    rf"|{_SORRY}(?:i|we) (?:do not|don['’]?t) (?:have (?:access|enough|any information|the (?:ability|capability))"
    rf"|understand (?:your|the|what you))"
    rf"|{_SORRY}(?:the|this) (?:task|question|request|instruction|input)\b"
    rf"|{_UNABLE} (?:assist|help (?:you )?with (?:that|this)|comply|fulfill?|generate|browse|access|provide"
    rf"|(?:answer|complete|process|perform|execute|respond to) (?:that|this|your|the))\b"
    rf"|(?:{_ZH_SORRY}[，,。!！ ]*)?(?:作为|身为)[^，,。.\n的]{{0,12}}{_ZH_MODEL}"
    rf"[^，,。.\n的]{{0,10}}(?:[，,、]|我|无法|不能|没有)"
    rf"|(?:{_ZH_SORRY}[，,。!！ ]*)?我(?:只|仅|仅仅)?是一?[个名款种]?[^，,。.\n]{{0,6}}{_ZH_MODEL}"
    rf"(?:语言模型|模型|助手|程序|系统)?(?:[，,。.!！、；;]|$)"
    rf"|{_ZH_SORRY}[^。!！\n们]{{0,20}}{_ZH_UNABLE}[^。，,\n们]{{0,8}}{_ZH_TASK}"
    rf"|我?(?:目前|暂时)?{_ZH_UNABLE}(?:直接)?(?:回答|执行|完成|提供)(?:该|此|这|您|你)"
    r")"
)

# The marks by which templates tell turns apart.  In an answer they mean that it swallowed the next turn.
_TURN_MARK = (
    r"(?m)^[ \t]*#{2,4} ?(?:[Ii]nstruction|[Ii]nput|[Rr]esponse|[Hh]uman|[Aa]ssistant|[Uu]ser|指令|输入|回答|回复)"
    r" ?[:：]"
    r"|^[ \t]*(?:Human|Assistant|HUMAN|ASSISTANT|USER|\[Human\]|\[Assistant\]|人类|助手) ?[:：]"
    r"|^[ \t]*<(?:human|bot|assistant|user)> ?[:：]"
    r"|</s>|\[/?INST\]|<</?SYS>>|<start_of_turn>|<reserved_10[67]>"
    r"|<\|(?:im_start|begin_of_text|start_header_id|end_header_id|user|assistant|system)\|>"
    # One more at the very end is no turn swallowed, only the end spelled out: whole collections are like that.
    r"|(?:<\|(?:im_end|im_sep|endoftext|eot_id|end_of_text|end|EOT)\|>|<end_of_turn>)\s*\S"
)

_ARITHMETIC = r"[0-9]+(?:[\s\x0b]*[-+*/][\s\x0b]*[0-9]+)+[\s\x0b]*=[\s\x0b]*[0-9]+"
_URL = r"(?:\b(?i:https?|ftp)://|\b(?:www|WWW)\.)[^\s<>\"'，。；、）]{3,}"
# The element names of HTML, but for "s", which is a mark of turns.  A single capital letter is a type: List<A>.
_ELEMENTS = (
    "a|abbr|address|article|aside|audio|b|big|blockquote|body|br|button|canvas|caption|center|cite|code|col|colgroup|dd"
    "|del|details|div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|frame|frameset|h[1-6]|head|header|hr"
    "|html|i|iframe|img|input|ins|kbd|label|legend|li|link|main|map|mark|meta|nav|noscript|object|ol|optgroup|option|p"
    "|param|pre|q|samp|script|section|select|small|source|span|strike|strong|style|sub|summary|sup|svg|table|tbody|td"
    "|template|textarea|tfoot|th|thead|title|tr|tt|u|ul|var|video"
)
_CAPITALS = "|".join(name.upper() for name in _ELEMENTS.split("|") if len(name) > 1)
_TAG = rf"<(?:!(?i:doctype)\b[^<>]*>|!--|/?(?:{_ELEMENTS}|{_CAPITALS})(?:\s[^<>]*)?/?>)"


def placeholder_answers(texts: pa.Array, inputs: pa.Array, outputs: pa.Array) -> Mask:
    """Marks rows whose whole input or answer is a placeholder, or that hold ``<noinput>`` or ``<nooutput>`` anywhere.

    Placeholders, in any case, with or without brackets and a full stop: no input, nooutput, N/A, None, null, nan,
    output, "...", 无, 暂无, 无输入 and the like.  An empty input or answer is not one.
    """
    mask = _matches(inputs, _PLACEHOLDER) | _matches(outputs, _PLACEHOLDER)
    return mask | (_counts(texts, _NO_INPUT_TOKEN, ("<",)) > 0)


def refusal_answers(outputs: pa.Array) -> Mask:
    """Marks answers that begin as a refusal or with what the speaker is: "As an AI ...", "抱歉，我无法回答 ..."."""
    return _matches(outputs, _REFUSAL)


def turn_marks(outputs: pa.Array) -> Mask:
    """Marks answers that hold a mark of a template or of a chat: "### Instruction:", "Human:" at a line start, </s>.

    Marks of the end of a text, such as <|endoftext|>, count where text follows them.
    """
    return _matches(outputs, _TURN_MARK)


def blank_turns(history: pa.Array) -> Mask:
    """Marks rows of which an earlier turn has an empty user or assistant side."""
    import pyarrow.compute as pc

    turns = history.flatten()
    num_turns_B = pc.fill_null(pc.list_value_length(history), 0).to_numpy(zero_copy_only=False)
    mask = np.zeros(len(history), dtype=np.bool_)
    for side in ("user", "assistant"):
        texts = pc.fill_null(pc.struct_field(turns, side), "")
        mask |= np.bincount(
            np.repeat(np.arange(len(history)), num_turns_B)[_matches(texts, rf"^{_SPACE}$")], minlength=len(history)
        ).astype(np.bool_)
    return mask


def copied_instructions(instructions: pa.Array, outputs: pa.Array) -> Mask:
    """Marks answers that equal their instruction but for case and whitespace; an empty one never does."""
    import pyarrow.compute as pc

    # Folding whole columns costs far more than to look at first letters, which differ in nearly all rows.
    first_letters = []
    for column in (instructions, outputs):
        first = pc.utf8_slice_codeunits(pc.utf8_ltrim(column, _WHITESPACE), 0, 1).dictionary_encode()
        folded = np.array([letter.casefold()[:1] for letter in first.dictionary.to_pylist()], dtype="U1")
        first_letters.append(folded[first.indices.to_numpy()])
    candidates = np.flatnonzero((first_letters[0] == first_letters[1]) & (first_letters[0] != ""))
    mask = np.zeros(len(outputs), dtype=np.bool_)
    pairs = (pc.take(column, candidates).to_pylist() for column in (instructions, outputs))
    for row, instruction, output in zip(candidates, *pairs, strict=True):
        mask[row] = _fold(instruction) == _fold(output)
    return mask


def sums(texts: pa.Array) -> Mask:
    """Marks texts that hold a sum with its result, such as ``12 + 3 * 4 = 24``."""
    return _counts(texts, _ARITHMETIC, ("=",)) > 0


def count_urls(texts: pa.Array) -> NDArray[np.int32]:
    """Counts what begins with http://, https://, ftp:// or www."""
    return _counts(texts, _URL, ("://", "www.", "WWW."))


def count_html_tags(texts: pa.Array) -> NDArray[np.int32]:
    """Counts tags of HTML's elements, opening and closing, comments and doctypes; ``a < b`` and ``<T>`` are none."""
    return _counts(texts, _TAG, ("<",))


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()


def _matches(texts: pa.Array, pattern: str) -> Mask:
    import pyarrow.compute as pc

    mask: Mask = pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)
    return mask


def _counts(texts: pa.Array, pattern: str, literals: tuple[str, ...]) -> NDArray[np.int32]:
    """Counts matches in each text; each match holds one of the literals, for which all texts are searched first."""
    import pyarrow.compute as pc

    utf8, offsets_B1 = utf8_bytes(texts)
    rows = np.unique(np.concatenate([_rows_with(utf8, offsets_B1, literal) for literal in literals]))
    counts = np.zeros(len(texts), dtype=np.int32)
    counts[rows] = pc.count_substring_regex(pc.take(texts, rows), pattern).to_numpy()
    return counts


def _rows_with(utf8: NDArray[np.uint8], offsets_B1: NDArray[np.int64], literal: str) -> NDArray[np.int64]:
    """Returns the rows that may hold an ASCII literal; one that begins in the row before is not told apart.

    Comparing whole arrays byte by byte is several times as fast as a search in each text.
    """
    num_places = max(len(utf8) - len(literal) + 1, 0)
    found = np.ones(num_places, dtype=np.bool_)
    for place, byte in enumerate(literal.encode()):
        found &= utf8[place : place + num_places] == byte
    return np.unique(np.searchsorted(offsets_B1, np.flatnonzero(found), side="right") - 1)
