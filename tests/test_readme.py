"""The README says what is true: its Python runs, its commands exist, its tree is the tree."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import WORDS, make_rows
from typer.main import get_command

import doremi_mix
from doremi_mix import plan
from doremi_mix.cli import app
from doremi_mix.config import Config
from doremi_mix.export_files import list_formats
from doremi_mix.report.format_table import markdown_formats
from doremi_mix.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for name in WORDS:
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(make_rows(name, 2500)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "CPU_STEPS", 3)
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for name in WORDS:
        assert re.search(rf"^{name} +0\.\d{{3}}$", printed, re.MULTILINE)
    assert (tmp_path / "runs" / "first" / "mixture" / "mixture.jsonl").stat().st_size > 1_000_000


def commands():
    text = README + "".join(path.read_text() for path in (ROOT / "configs").glob("*.yaml"))
    return sorted(set(re.findall(r"(?:^|[`#(] *|\| )(doremi-mix [^\n`#)]+)", text)))


@pytest.mark.parametrize("line", commands())
def test_the_commands_exist(line):
    words = shlex.split(line)[1:]
    group = get_command(app)
    if words[0].startswith("--"):
        return
    assert words[0] in group.commands, line
    known = {option for parameter in group.commands[words[0]].params for option in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= known, line


def test_the_table_of_formats_is_what_was_proven():
    shown = README.partition("<!-- formats: written by scripts/consumers_table.py -->\n")[2]
    assert shown.partition("<!-- end of formats -->")[0].strip() == markdown_formats(list_formats()).strip()


def test_settings_that_the_readme_names_exist():
    sections = {name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")}
    for section, key in re.findall(r"`(\w+)\.(\w+)`?", README):
        if section in sections and key not in ("json", "jsonl", "png"):
            assert key in Config.model_fields[section].annotation.model_fields, f"{section}.{key}"


def test_the_tree_is_the_tree():
    (tree,) = blocks("text")
    package = Path(doremi_mix.__file__).parent
    listed = set(re.findall(r"^  (\w+\.py)", tree, re.MULTILINE))
    assert listed == {path.name for path in package.glob("*.py")} - {"__main__.py"}
    for folder in ("sources", "report", "stages"):
        assert f"{folder}/" in tree
    for stage in STAGES:
        assert f"| `{stage.name}` |" in README


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for script in re.findall(r"(?:bash|python) (scripts/[\w/.]+)", README):
        assert (ROOT / script).exists(), script
