"""How the tables are read: by the csv module, GitHub's rules for Markdown tables, JSON and YAML.

They know domains by name and draw nothing themselves: what is returned are the shares of tokens, of what is drawn.
"""

import csv
import io
import json
import math
import re

import yaml

# What a spreadsheet takes for the start of a formula, and what some import filters drop before one.
FORMULAS = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")

# Words that are no text in some version of YAML.
WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf"}


def only(files):
    (text,) = files.values()
    return text


def drawn(shares):
    """Checks shares as a program would that wants a distribution; names of which nothing is drawn are left out."""
    for name, share in shares.items():
        assert isinstance(name, str)
        assert name
        assert type(share) is float
        assert math.isfinite(share)
        assert share >= 0
    assert abs(sum(shares.values()) - 1) < 1e-9
    return {name: share for name, share in shares.items() if share}


def once(pairs):
    data = dict(pairs)
    assert len(data) == len(pairs)
    return data


def read_csv(files, sizes):
    header, *rows = csv.reader(io.StringIO(only(files), newline=""), strict=True)
    assert header == ["name", "weight", "token_share", "example_share", "tokens", "examples", "epochs"]
    pairs = []
    for row in rows:
        assert len(row) == len(header)
        assert not row[0].startswith(FORMULAS)
        for number in filter(None, row[1:]):
            assert float(number) >= 0
        pairs.append((row[0].removeprefix("'"), float(row[2])))
    return drawn(once(pairs))


def split_cells(line):
    """Splits a line of a table at the pipes that no backslash escapes; the space around a cell is dropped."""
    cells, cell, escaped = [], "", False
    for character in line:
        if character == "|" and not escaped:
            cells.append(cell.strip(" "))
            cell = ""
        else:
            cell += character
        escaped = character == "\\" and not escaped
    assert cells[0] == ""
    assert cell == ""
    return cells[1:]


def shown(cell):
    """What Markdown shows of a cell: escapes and numeric references undone; markup must not be left."""
    text, position = "", 0
    for match in re.finditer(r"\\([!-/:-@\[-`{-~])|&#([0-9]+);|[`*\[\]<>~&$\\]", cell):
        assert match[1] or match[2], f"{cell!r} holds markup"
        text += cell[position : match.start()] + (match[1] or chr(int(match[2])))
        position = match.end()
    return text + cell[position:]


def read_markdown(files, sizes):
    text = only(files)
    assert text.endswith("|\n")
    # What any reader takes for the end of a line must be one.
    lines = text.splitlines()
    assert lines == text[:-1].split("\n")
    header, rule, *rows = map(split_cells, lines)
    assert all(re.fullmatch(":?-+:?", cell) for cell in rule)
    assert {len(row) for row in (header, rule, *rows)} == {7}
    shares = once([(shown(row[0]), float(row[header.index("share of tokens")])) for row in rows])
    # Rounded for people, so that the sum is only nearly 1.
    assert abs(sum(shares.values()) - 1) < 1e-5
    return {name: share for name, share in shares.items() if share}


def read_ratio(files, sizes):
    data = json.loads(only(files), object_pairs_hook=once)
    assert all(name.endswith(".jsonl") and "/" not in name for name in data)
    return drawn({name.removesuffix(".jsonl"): share for name, share in data.items()})


def read_domain_weights(files, sizes):
    data = json.loads(only(files), object_pairs_hook=once)
    assert (data["format"], data["version"], data["unit"]) == ("doremi-mix/domain-weights", 1, "tokens")
    assert data["shares"]["token"] == data["domain_weights"]
    assert set(data["reference_weights"]) == set(data["domain_weights"])
    assert set(data["corpus"]) in (set(), set(data["domain_weights"]))
    return drawn(data["domain_weights"])


def read_yaml(files, sizes):
    (pairs,) = (node.value for node in [yaml.compose(only(files))])
    for key, _ in pairs:
        # Text that some version of YAML takes for a number, a truth or nothing must be quoted.
        assert key.style == '"' or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_/.-]*", key.value)
        assert key.style == '"' or key.value.lower() not in WORDS
    data = yaml.safe_load(only(files))
    assert len(data) == len(pairs)
    return drawn(data)


READERS = {
    "csv": read_csv,
    "markdown": read_markdown,
    "ratio": read_ratio,
    "domain-weights": read_domain_weights,
    "yaml": read_yaml,
}
