import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from doremi_mix.errors import ConfigError, SchemaError, SourceFormatError
from doremi_mix.sources import Source, open_source
from doremi_mix.sources.readers import RawRow, domain_name, find_files
from doremi_mix.sources.schemas import RowSchema, detect_schema, to_example
from doremi_mix.types import Example, Rejection


def detect(*columns: str, **settings: object) -> RowSchema:
    return detect_schema("d.json", [dict.fromkeys(columns, "x")], **settings)


@pytest.mark.parametrize(
    ("columns", "description"),
    [
        ("instruction input output", "alpaca (instruction, input, output)"),
        ("instruction input output text meta", "alpaca (instruction, input, output)"),
        ("text instruction output history system", "alpaca (instruction, output, history, system)"),
        ("prompt completion", "alpaca (instruction=prompt, output=completion)"),
        ("query response history", "alpaca (instruction=query, output=response, history)"),
        ("question answer", "alpaca (instruction=question, output=answer)"),
        ("problem solution level", "alpaca (instruction=problem, output=solution)"),
        ("instruction context response category", "alpaca (instruction, input=context, output=response)"),
        ("messages", "chat (messages)"),
        ("id conversations system", "chat (messages=conversations, system)"),
        ("prompt messages text", "chat (messages)"),
        ("id text url", "text (text)"),
    ],
)
def test_detect_schema(columns, description):
    assert detect(*columns.split()).describe() == description


def test_columns_of_any_row_count():
    rows = [{"instruction": "x", "output": "y"}, {"instruction": "x", "input": "z", "output": "y"}]
    assert detect_schema("d.json", rows).columns == {"instruction": "instruction", "input": "input", "output": "output"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            "id prompt question answer",
            'columns "prompt" and "question" all fit instruction (columns found: id, prompt, question, answer);'
            " choose one in the config: sources: - {path: d.json, columns: {instruction: prompt}}",
        ),
        (
            "instruction output response",
            'columns "output" and "response" all fit output (columns found: instruction, output, response);'
            " choose one in the config: sources: - {path: d.json, columns: {output: output}}",
        ),
        (
            "conversations messages",
            'columns "messages" and "conversations" all fit messages (columns found: conversations, messages);'
            " choose one in the config: sources: - {path: d.json, columns: {messages: messages}}",
        ),
        (
            "messages prompt response",
            'columns "prompt" and "response" fit schema alpaca and "messages" fits schema chat (columns found:'
            " messages,"
            " prompt, response); choose in the config: sources: - {path: d.json, schema: chat}",
        ),
        (
            "question text",
            'column "text" fits schema text, but "question" fits instruction of schema alpaca (columns found: question,'
            " text); choose in the config: sources: - {path: d.json, schema: text}",
        ),
        (
            "id q a",
            "no schema fits (columns found: id, q, a; looked for alpaca: instruction or prompt or query or question or"
            " problem, and output or response or completion or answer or solution; chat: messages or"
            " conversations; text:"
            " text); name the columns in the config: sources: - {path: d.json, columns: {instruction: ..., output:"
            " ...}}",
        ),
    ],
)
def test_what_a_person_must_decide(columns, message):
    with pytest.raises(SchemaError) as caught:
        detect(*columns.split())
    assert str(caught.value) == f"d.json: {message}"


def test_many_columns_are_not_all_listed():
    with pytest.raises(SchemaError, match=r"columns found: c0, c1, .*, c11 and 28 more; looked for"):
        detect(*(f"c{i}" for i in range(40)))


@pytest.mark.parametrize(
    ("columns", "settings", "description"),
    [
        (
            "prompt question answer",
            {"columns": {"instruction": "question"}},
            "alpaca (instruction=question, output=answer)",
        ),
        ("input output", {"columns": {"instruction": "input"}}, "alpaca (instruction=input, output)"),
        ("q a", {"columns": {"instruction": "q", "output": "a"}}, "alpaca (instruction=q, output=a)"),
        ("instruction output messages", {"schema": "chat"}, "chat (messages)"),
        ("instruction output messages", {"schema": "alpaca"}, "alpaca (instruction, output)"),
        ("messages conversations", {"columns": {"messages": "conversations"}}, "chat (messages=conversations)"),
        ("question content", {"columns": {"text": "content"}}, "text (text=content)"),
        ("instruction output text", {"schema": "text"}, "text (text)"),
        ("messages sys", {"columns": {"system": "sys"}}, "chat (messages, system=sys)"),
    ],
)
def test_the_config_settles_it(columns, settings, description):
    assert detect(*columns.split(), **settings).describe() == description


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"columns": {"output": "respnse"}},
            SchemaError,
            'd.json: columns names "respnse" for output, which is not in the file; did you mean response? (columns'
            " found:"
            " prompt, response); correct it in the config",
        ),
        (
            {"schema": "chat"},
            SchemaError,
            "d.json: no column fits messages of schema chat (columns found: prompt, response; looked for messages,"
            " conversations); name it in the config: sources: - {path: d.json, columns: {messages: ...}}",
        ),
        (
            {"schema": "alpacca"},
            ConfigError,
            'schema must be one of alpaca, chat, text, got "alpacca"; did you mean alpaca?',
        ),
        (
            {"columns": {"instructions": "prompt"}},
            ConfigError,
            'columns names the unknown part "instructions"; did you mean instruction?; the parts are instruction,'
            " input,"
            " output, history, system, messages, text",
        ),
        (
            {"schema": "text", "columns": {"output": "response"}},
            ConfigError,
            'columns names the unknown part "output"; the parts of schema text are text',
        ),
        (
            {"columns": {"output": "response", "messages": "prompt"}},
            ConfigError,
            "columns names parts of different schemas (output, messages); name parts of one: alpaca has"
            " instruction, input,"
            " output, history, system; chat has messages, system; text has text",
        ),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error) as caught:
        detect("prompt", "response", **settings)
    assert str(caught.value) == message


ALPACA = RowSchema("alpaca", {"instruction": "instruction", "output": "output"})
CHAT = RowSchema("chat", {"messages": "messages"})
TEXT = RowSchema("text", {"text": "text"})


def convert(row: object, schema: RowSchema = ALPACA) -> Example | Rejection:
    return to_example(RawRow(7, row, "RAW"), path=Path("p/d.json"), domain="d", schema=schema)


def test_alpaca_text_is_passed_on_exactly():
    row = {
        "instruction": " a\n",
        "input": "\tb ",
        "output": "c\r\n ",
        "history": [["q", " r "], ["", "s"]],
        "system": " t",
    }
    assert convert(row) == Example("d:7", "d", " a\n", "\tb ", "c\r\n ", (("q", " r "), ("", "s")), " t", "RAW")


@pytest.mark.parametrize("row", [{}, {"input": None, "history": None, "system": None}, {"history": []}])
def test_optional_columns_may_be_null_or_absent(row):
    assert convert(row | {"instruction": "a", "output": "c"}) == Example("d:7", "d", "a", "", "c", (), "", "RAW")


def test_a_column_that_holds_one_part_holds_no_other():
    schema = detect("input", "output", columns={"instruction": "input"})
    assert convert({"input": "a", "output": "c"}, schema) == Example("d:7", "d", "a", "", "c", (), "", "RAW")


@pytest.mark.parametrize("row", [{"input": "b"}, {"history": [["q", "r"]]}])
def test_an_empty_instruction_is_fine_when_there_is_something_to_answer(row):
    example = convert(row | {"instruction": " ", "output": "c"})
    assert isinstance(example, Example)
    assert example.instruction == " "


PAIRS = '"history" must be a list of [user, assistant] pairs of strings'


@pytest.mark.parametrize(
    ("row", "rule", "detail"),
    [
        ({"output": None}, "missing_output", '"output" must be there, got null'),
        ({"instruction": None}, "missing_instruction", '"instruction" must be there, got null'),
        ({"output": ["c"]}, "wrong_type", '"output" must be a string, got a list'),
        ({"output": 5}, "wrong_type", '"output" must be a string, got a number'),
        ({"output": True}, "wrong_type", '"output" must be a string, got a boolean'),
        ({"instruction": {"x": 1}}, "wrong_type", '"instruction" must be a string, got an object'),
        ({"input": 1.5}, "wrong_type", '"input" must be a string, got a number'),
        ({"system": []}, "wrong_type", '"system" must be a string, got a list'),
        ({"output": ""}, "empty_output", '"output" has no text'),
        ({"output": " \n\u3000"}, "empty_output", '"output" has no text'),
        (
            {"instruction": "", "input": " ", "history": [["", "\n"]]},
            "empty_instruction",
            "there is no text to answer: no instruction, input or history",
        ),
        ({"history": "q"}, "wrong_type", f"{PAIRS}, got a string"),
        ({"history": [["q", "r"], ["q"]]}, "wrong_type", f"{PAIRS}, got [a string] at 2"),
        ({"history": [["q", None]]}, "wrong_type", f"{PAIRS}, got [a string, null] at 1"),
        ({"history": [{"q": "r"}]}, "wrong_type", f"{PAIRS}, got an object at 1"),
    ],
)
def test_unusable_alpaca_rows(row, rule, detail):
    expected = Rejection("d:7", "d", "p/d.json", 7, rule, detail, "RAW")
    assert convert({"instruction": "a", "output": "c"} | row) == expected


def test_absent_required_column():
    got = convert({"instruction": "a"})
    assert got == Rejection(
        "d:7", "d", "p/d.json", 7, "missing_output", '"output" must be there, got no such column', "RAW"
    )


def test_the_problem_of_a_raw_row_is_its_rejection():
    raw = RawRow(3, None, "{", ("broken_json", "the line is not JSON: why"))
    got = to_example(raw, path="p", domain="d", schema=ALPACA)
    assert got == Rejection("d:3", "d", "p", 3, "broken_json", "the line is not JSON: why", "{")


def chat(turns: str) -> Example | Rejection:
    """Reads turns as "role:text" divided by bars."""
    parts = [turn.partition(":") for turn in turns.split("|")]
    return convert({"messages": [{"role": role, "content": text} for role, _, text in parts]}, CHAT)


@pytest.mark.parametrize(
    ("turns", "history", "instruction", "output", "system"),
    [
        ("user:q|assistant:a", (), "q", "a", ""),
        ("human:q|gpt:a|human:r|bot:b|Human:s|chatgpt:c", (("q", "a"), ("r", "b")), "s", "c", ""),
        ("system:s|user:q|model:a", (), "q", "a", "s"),
        ("system:s|user:q|assistant:a|system:t|user:r|assistant:b", (("q", "a"),), "r", "b", "s\nt"),
        ("user:q|user: r|assistant:a|assistant:b ", (), "q\n r", "a\nb ", ""),
        ("assistant:hi|user:q|assistant:a", (("", "hi"),), "q", "a", ""),
        ("user:q|assistant:a|user:bye", (), "q", "a", ""),
        ("user:q|assistant: |tool:42|assistant:a", (), "q\n42", "a", ""),
        (
            "user:q|assistant:let me see|observation:42|function:43|assistant:a",
            (("q", "let me see"),),
            "42\n43",
            "a",
            "",
        ),
    ],
)
def test_chat(turns, history, instruction, output, system):
    assert chat(turns) == Example("d:7", "d", instruction, "", output, history, system, "RAW")


def test_sharegpt_names_and_a_system_column():
    schema = RowSchema("chat", {"messages": "conversations", "system": "system"})
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "role": None, "content": None}]
    row = {"conversations": turns, "system": "s"}
    assert convert(row, schema) == Example("d:7", "d", "q", "", "a", (), "s", "RAW")


ROLES = "user, human, tool, function, observation, assistant, gpt, bot, chatgpt, model, system"


@pytest.mark.parametrize(
    ("messages", "rule", "detail"),
    [
        (None, "missing_messages", '"messages" must be there, got null'),
        ("user: hi", "wrong_type", '"messages" must be a list, got a string'),
        ([], "no_assistant_turn", '"messages" must have a turn of the assistant, got none'),
        (
            [{"role": "user", "content": "q"}],
            "no_assistant_turn",
            '"messages" must have a turn of the assistant, got none',
        ),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}],
            "empty_output",
            'no turn of the assistant in "messages" has text',
        ),
        (
            [{"role": "assistant", "content": "a"}],
            "empty_instruction",
            "there is no text to answer: no instruction, input or history",
        ),
        (
            [{"role": "narrator", "content": "q"}],
            "unknown_role",
            f"turn 1 of \"messages\" has the role 'narrator', expected one of {ROLES}",
        ),
        (["q"], "wrong_type", 'turn 1 of "messages" must be an object, got a string'),
        ([{"content": "q"}], "missing_role", 'turn 1 of "messages" has no role'),
        ([{"role": "user"}], "missing_content", 'turn 1 of "messages" has no content'),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "wrong_type",
            'the content of turn 1 of "messages" must be a string, got a list',
        ),
    ],
)
def test_unusable_chats(messages, rule, detail):
    assert convert({"messages": messages}, CHAT) == Rejection("d:7", "d", "p/d.json", 7, rule, detail, "RAW")


def test_plain_text():
    assert convert({"text": " x\n"}, TEXT) == Example("d:7", "d", None, "", " x\n", (), "", "RAW")
    assert convert({"text": " "}, TEXT) == Rejection(
        "d:7", "d", "p/d.json", 7, "empty_output", '"text" has no text', "RAW"
    )
    assert convert({}, TEXT).rule == "missing_text"


def test_open_source_reads_all_rows_each_time(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "" if i == 250 else f"a{i}"} for i in range(300)]
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode() + b"\n{broken}\n"))
    source = open_source(Source("d", path))
    assert (source.format, source.schema.describe()) == ("jsonl", "alpaca (instruction=prompt, output=completion)")
    for _ in range(2):
        got = list(source)
        assert [one.id for one in got] == [f"d:{i}" for i in range(1, 302)]
        assert got[0] == Example("d:1", "d", "q0", "", "a0", (), "", '{"prompt":"q0","completion":"a0"}')
        assert [(one.row_number, one.rule) for one in got if isinstance(one, Rejection)] == [
            (251, "empty_output"),
            (301, "broken_json"),
        ]


# --- what Data-Juicer exports ---

STATS = {"__dj__hash": "0a1b", "__dj__source_file__": "a.jsonl", "__dj__stats__": {"text_len": 7, "lang": "en"}}
PAIR = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}
EXPORTED = {
    "beside": {"text": "Add 1 and 2.  3", **PAIR, "meta": {"lang": "en"}, **STATS},
    "under meta": {"text": "Add 1 and 2.  3", "meta": PAIR, **STATS},
    "query and response": {"query": PAIR["instruction"], "response": "3", "history": [], "text": "x", **STATS},
    "turns": {
        "messages": [{"role": "user", "content": PAIR["instruction"]}, {"role": "assistant", "content": "3"}],
        "text": "x",
        **STATS,
    },
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("rows", "description"),
    [
        ("beside", "alpaca (instruction, input, output)"),
        ("under meta", "alpaca (instruction, input, output under meta)"),
        ("query and response", "alpaca (instruction=query, output=response, history)"),
        ("turns", "chat (messages)"),
    ],
)
def test_what_data_juicer_exports(tmp_path, rows, description, kind):
    row = EXPORTED[rows]
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":  # where the statistics are JSON in a string
        row = {**row, "__dj__stats__": json.dumps(row["__dj__stats__"])}
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if kind == "json" else row) + "\n", encoding="utf-8")
    opened = open_source(Source("d", path))
    assert opened.schema.describe() == description
    (example,) = opened
    assert (example.instruction, example.input, example.output) == ("Add 1 and 2.", "", "3")
    assert json.loads(example.row) == row


def test_plain_text_of_data_juicer_stays_plain_text():
    rows = [{"text": "A story.", "meta": {"url": "x", "output": "y"}, **STATS}]
    assert detect_schema("d.jsonl", rows).describe() == "text (text)"


@pytest.mark.parametrize(
    ("row", "settings", "description"),
    [
        ({"text": "x", "meta": PAIR}, {"schema": "text"}, "text (text)"),
        ({"text": "x", "meta": PAIR}, {"schema": "alpaca"}, "alpaca (instruction, input, output under meta)"),
        (
            {"text": "x", "meta": {"q": "1", "a": "2"}},
            {"columns": {"instruction": "meta.q", "output": "meta.a"}},
            "alpaca (instruction=q, output=a under meta)",
        ),
        ({"meta": {"content": "1"}}, {"columns": {"text": "meta.content"}}, "text (text=content under meta)"),
        (
            {"meta.q": "1", "a": "2"},
            {"columns": {"instruction": "meta.q", "output": "a"}},
            "alpaca (instruction=meta.q, output=a)",
        ),
        ({"prompt": "p", "response": "r", "meta": PAIR}, {}, "alpaca (instruction=prompt, output=response)"),
        ({"messages": [], "meta": PAIR}, {}, "chat (messages)"),
    ],
)
def test_what_is_read_from_meta(row, settings, description):
    assert detect_schema("d.json", [row], **settings).describe() == description


def test_a_row_whose_meta_is_no_object_is_rejected(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [EXPORTED["under meta"], {"text": "x", "meta": "lost"}, {"meta": {**PAIR, "output": ""}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    good, *bad = open_source(Source("d", path))
    assert isinstance(good, Example)
    assert [(rejection.rule, rejection.detail) for rejection in bad] == [
        ("wrong_type", '"meta" must be an object, got a string'),
        ("empty_output", '"output" has no text'),
    ]
    assert json.loads(bad[1].row) == rows[2]


def test_the_statistics_that_data_juicer_writes_beside_rows_are_no_source():
    with pytest.raises(SchemaError) as caught:
        detect_schema("d_stats.jsonl", [{"__dj__stats__": {"text_len": 7}, "__dj__meta__": {}}])
    assert str(caught.value) == (
        "d_stats.jsonl: holds what Data-Juicer says about rows (__dj__stats__, __dj__meta__) and not the rows, which "
        "are in the file beside it; leave it out"
    )


def test_an_optional_column_may_come_late(tmp_path):
    rows = [{"instruction": "a", "output": "c"}] * 300 + [{"instruction": "a", "input": "b", "output": "c"}]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    assert [one.input for one in open_source(Source("d", tmp_path / "d.json"))] == [""] * 300 + ["b"]


def test_chat_in_parquet(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "id": 1}]), tmp_path / "d.parquet")
    source = open_source(Source("d", tmp_path / "d.parquet"))
    assert [(one.instruction, one.output) for one in source] == [("q", "a")]


def test_source_settings_reach_the_schema(tmp_path):
    (tmp_path / "d").write_text('[{"prompt": "p", "question": "q", "answer": "a"}]', encoding="utf-8")
    source = Source("d", tmp_path / "d", format="json", schema="alpaca", columns={"instruction": "question"})
    assert [one.instruction for one in open_source(source)] == ["q"]


def test_a_file_without_one_usable_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("id,text\n1,x\n", encoding="utf-8")
    with pytest.raises(SourceFormatError) as caught:
        open_source(Source("d", path))
    assert str(caught.value) == (
        f"{path}: none of its first 2 rows can be used (row 1: the line is not JSON: expecting a value at character 1);"
        " give rows that are JSON objects"
    )


@pytest.mark.parametrize("name", ["", " a", "a/b", "a\\b", ".a", "a\nb", "\udcff"])
def test_domain_names_that_cannot_name_a_file(name):
    with pytest.raises(ConfigError) as caught:
        Source(name, Path("d.json"))
    assert str(caught.value) == (
        f"d.json: the domain name {name!r} cannot name a file, expected printable characters, no slash and no dot"
        " or space"
        " first; set another: sources: - {path: d.json, name: ...}"
    )


def test_source_settings_are_checked():
    with pytest.raises(ConfigError) as caught:
        Source("d", Path("d.json"), format="json.gz")
    assert str(caught.value) == (
        'd.json: format must be one of json, jsonl, parquet (compression is recognized), got "json.gz"; did you'
        " mean json?"
    )
    with pytest.raises(ConfigError, match=r"^d\.json: schema must be one of alpaca, chat, text, got \"x\"$"):
        Source("d", Path("d.json"), schema="x")


def test_real_files(shared_data):
    # Counted with json.load alone: all rows, and those whose output is blank.
    counts = {"belle_eval_zh": (1000, 369), "civics_zh": (177, 1), "gsm8k": (4545, 0), "gpt4all_rows": (2339, 0)}
    for path in find_files([shared_data / "pool20", shared_data / "contest"]):
        source = open_source(Source(domain_name(path), path))
        assert source.schema.describe() == "alpaca (instruction, input, output)"
        if source.source.name in counts:
            got = list(source)
            rejected = [one for one in got if isinstance(one, Rejection)]
            assert (len(got), len(rejected)) == counts[source.source.name]
            assert {one.rule for one in rejected} <= {"empty_output"}
