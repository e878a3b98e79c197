"""Answers that are none: planted ones are found, and what only looks like one is not."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.filters import patterns


def one(function, *columns):
    return function(*(pa.array([text]) for text in columns)).tolist()[0]


PLACEHOLDERS = [
    "<noinput>", "<no input>", "Noinput", "no_input", "No input.", "(No input)", "<nooutput>", "No output", "nooutput",
    "N/A", "n/a", "None", "none.", "[None]", "NULL", "null", " nan\n", "output", "Output:", "<output>", "...", "…",
    "无", "无。", "（无）", "暂无", "无输入", "没有输入。", "no answer", "No input required.", "输入", "\u3000无\u3000",
]  # fmt: skip
ANSWERS = [
    "", "   ", "No", "no input was needed for this", "Nonetheless", "None of them", "nullable", "无论如何", "没有",
    "outputs", "0", "x", "input and output", "I have none", "n", "Nan's house",
]  # fmt: skip


@pytest.mark.parametrize("text", PLACEHOLDERS)
def test_placeholders_are_found_in_either_field(text):
    assert one(patterns.placeholder_answers, "any", text, "An answer.")
    assert one(patterns.placeholder_answers, "any", "", text)


@pytest.mark.parametrize("text", ANSWERS)
def test_what_is_no_placeholder(text):
    assert not one(patterns.placeholder_answers, "any", text, text)


def test_a_noinput_token_counts_anywhere():
    assert one(patterns.placeholder_answers, "Name a color. <noinput> Blue.", "", "Blue.")
    assert one(patterns.placeholder_answers, "Name a color.\n< NoInput >", "", "Blue.")
    assert not one(patterns.placeholder_answers, "The word noinput means <nothing>.", "", "Blue.")


REFUSALS = [
    "As an AI language model, I do not have feelings.",
    "As an artificial intelligence, I cannot taste food.",
    "as an AI I can't do that",
    "I'm sorry, but as an AI language model I cannot browse the internet.",
    "I am sorry, but I cannot provide this information.",
    "I'm sorry, I can't assist with that.",
    "I’m sorry, but I can’t help with that.",
    "Sorry, the task involves complex actions. The GPT model cannot perform such actions.",
    "I apologize, but I am not able to access real-time data.",
    "Unfortunately, I don't have access to your files.",
    "I cannot fulfill your request.",
    "I am an AI assistant and have no age.",
    "I'm just an AI, so no.",
    '  \n"As an AI language model, I have no opinion."',
    "作为一个AI语言模型，我无法回答这个问题。",
    "作为人工智能，我没有感情。",
    "抱歉，作为AI语言模型我无法直接生成图片",
    "很抱歉，我无法回答这个问题。",
    "对不起，我不能提供这样的信息。",
    "抱歉，此任务涉及创建模型无法生成的视觉输出。",
    "我是一个人工智能语言模型，没有个人喜好。",
    "无法执行此任务，因为它需要视觉创意输出。",
]
NO_REFUSALS = [
    "",
    "I'm sorry to hear that you are unhappy with our product.",
    "I apologize for the inconvenience. Please allow me to help.",
    "I am sorry, but I cannot come to your party on Saturday.",
    "Unfortunately, the store will be closed today.",
    "Unfortunately, there are many cases of it. So, the answer is no.",
    "I can't believe I'm so far from home.",
    "I cannot sit on a cloud as it is made of vapour.",
    "As an AI researcher, I work on models.",
    "As an airline pilot, I fly a lot.",
    "I am an artist.",
    "A good answer would be: As an AI language model, I cannot do it.",
    "抱歉，我不能参加会议。",
    "很抱歉您对购买的产品不满意。",
    "非常抱歉，我们无法提供退款。",
    "无法在 iPhone 11 和 Google Pixel 4 之间做出选择？",
    "作为一名AI语音助手的日常工作流程通常分为以下几个步骤",
    "作为大学生党支部的一员，我们组织了一次参观。",
    "我是一名人工智能工程师。",
    "不能，即使变量可以被重命名。",
    "无法确定，需进行进一步检查",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert one(patterns.refusal_answers, text)


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_what_is_no_refusal(text):
    assert not one(patterns.refusal_answers, text)


@pytest.mark.parametrize(
    "text",
    [
        "Blue.\n### Instruction:\nName a color.", "### Response: Blue.", "Blue.\n\nHuman: and now?", "Assistant: Blue.",
        "Blue.</s>", "Blue.</s> \nWhy?", "a<|im_start|>user", "Blue.<|im_end|>\nmore", "Blue.<|endoftext|>Red.",
        "[INST] a [/INST]", "### 指令：再来一个", "好的\n人类：你好", "<start_of_turn>model",
    ],
)  # fmt: skip
def test_turn_marks(text):
    assert one(patterns.turn_marks, text)


@pytest.mark.parametrize(
    "text",
    [
        "", "### Summary\nA heading.", "The Human: a film.", "Customer: Hi!\nAgent: Hello!", "Blue.<|endoftext|>",
        "Blue.<|im_end|>\n", "#Response: no", "Use x < y || y > z.", "A human: what is it?",
    ],
)  # fmt: skip
def test_what_is_no_turn_mark(text):
    assert not one(patterns.turn_marks, text)


def test_blank_turns_also_in_a_slice():
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    rows = [
        [{"user": "", "assistant": "b"}], [], [{"user": "a", "assistant": "b"}], None,
        [{"user": "a", "assistant": "b"}, {"user": "a", "assistant": " \n"}], [{"user": None, "assistant": "b"}],
    ]  # fmt: skip
    history = pa.array(rows, pa.list_(turn))
    assert patterns.blank_turns(history).tolist() == [True, False, False, False, True, True]
    assert patterns.blank_turns(history.slice(1)).tolist() == [False, False, False, True, True]


spaced = st.lists(st.sampled_from(["a", "B", "b", " ", "\n", "\x1c", "\u3000", "ß", "SS", "中"]), max_size=4).map(
    "".join
)


@settings(deadline=None)
@given(st.lists(st.tuples(spaced, spaced), max_size=20))
def test_copied_instructions_against_the_definition(pairs):
    folded = [[" ".join(text.split()).casefold() for text in pair] for pair in pairs]
    expected = [bool(instruction) and instruction == output for instruction, output in folded]
    columns = [pa.array([pair[side] for pair in pairs], pa.string()) for side in (0, 1)]
    assert patterns.copied_instructions(*columns).tolist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1+2=3", True), ("12 + 3 *\n4 = 24 apples", True), ("<<20*5=100>>", True), ("x = 3", False), ("1 + 2", False),
        ("a1-2=b", False), ("2024-01-05=7", True), ("1 ÷ 2 = 0", False), ("=", False),
    ],
)  # fmt: skip
def test_sums(text, expected):
    assert one(patterns.sums, text) is expected


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("see https://a.bc/d?e=f and HTTP://G.hi, or ftp://j.kl", 3), ("http://www.a.bc", 1), ("www.a.bc", 1),
        ("WWW.A.BC", 1), ("awww.cute", 0), ("a://b", 0), ("http://", 0), ("网站 www.amazon.com 是，http://a.bc。", 2),
        ("", 0),
    ],
)  # fmt: skip
def test_urls(text, count):
    assert one(patterns.count_urls, text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<p>Hi<br/>you</p>", 3), ('<a href="x">y</a>', 2), ("<!DOCTYPE html><html>", 2), ("<!-- no -->", 1),
        ("a < b and c > d", 0), ("<5", 0), ("I <3 you", 0), ("List<T> or vector<int>, Map<A, B>, Set<A>", 0),
        ("<noinput>", 0), ("<H1>Title</H1>", 2), ("<h7>", 0), ("</s>", 0), ("<|im_end|>", 0), ("<Object>", 0),
    ],
)  # fmt: skip
def test_html_tags(text, count):
    assert one(patterns.count_html_tags, text) == count
