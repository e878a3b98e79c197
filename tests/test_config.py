"""Settings: unknown and mistyped keys, overrides, the commented file."""

from pathlib import Path

import pytest
import yaml

from doremi_mix.config import Config, parse_config
from doremi_mix.config_file import apply_overrides, load_config_file, merge, write_commented
from doremi_mix.errors import ConfigError

SOURCES = {"sources": [{"path": "a.json"}, {"path": "b.json"}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {**SOURCES, "proxy": {"step_sise": 1}},
            "c.yaml: unknown key proxy.step_sise; did you mean proxy.step_size?",
        ),
        ({**SOURCES, "porxy": {}}, "c.yaml: unknown key porxy; did you mean proxy?"),
        (
            {**SOURCES, "mixture": {"zzz": 1}},
            "c.yaml: unknown key mixture.zzz; known: weights, token_budget, max_epochs, seed",
        ),
        (
            {"sources": [{"path": "a.json", "shema": "text"}]},
            "c.yaml: unknown key sources[0].shema; did you mean sources[0].schema?",
        ),
        (
            {**SOURCES, "proxy": {"steps": "many"}},
            "c.yaml: proxy.steps must be a whole number, got 'many'",
        ),
        (
            {**SOURCES, "proxy": {"smoothing": 2}},
            "c.yaml: proxy.smoothing must be less than or equal to 1, got 2",
        ),
        (
            {**SOURCES, "proxy": {"step_size": [1]}},
            "c.yaml: proxy.step_size must be a number, got a list",
        ),
        (
            {**SOURCES, "reference": {"weights": "naturel"}},
            "c.yaml: reference.weights must be natural, uniform or a mapping of domain to weight, got 'naturel'",
        ),
        (
            {"sources": [{"name": "x"}]},
            "c.yaml: sources[0].path is missing; expected the file: .json, .jsonl or .parquet, also .gz or .zst; "
            "relative to data_root",
        ),
        (
            {"load": {}},
            "c.yaml: expected either sources (a list of files) or catalog (bettermixture), got neither",
        ),
        (
            {**SOURCES, "catalog": "bettermixture"},
            "c.yaml: expected either sources (a list of files) or catalog (bettermixture), got both",
        ),
        ({"sources": "a.json"}, "c.yaml: sources must be a list, got 'a.json'"),
        (
            {**SOURCES, "reference": {"weights": {"a": "much"}}},
            "c.yaml: reference.weights.a must be a number, got 'much'",
        ),
    ],
)
def test_messages(data, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(data, where="c.yaml")
    assert str(caught.value) == message


def test_overrides_are_yaml_values_at_dotted_keys():
    data = apply_overrides(
        SOURCES, ["proxy.steps=200", "proxy.step_size=1e-1", "mixture.token_budget=1000", "tokenize.tokenizer=null"]
    )
    config = parse_config(data)
    assert config.proxy.steps == 200
    assert config.proxy.step_size == 0.1
    assert config.mixture.token_budget == 1000
    assert config.tokenize.tokenizer is None
    assert SOURCES == {"sources": [{"path": "a.json"}, {"path": "b.json"}]}


def test_text_settings_take_braces_and_an_emptied_section_is_the_default():
    data = apply_overrides({**SOURCES, "proxy": None}, ["tokenize.turn={query}", "reference.model=7"])
    config = parse_config(data)
    assert config.tokenize.turn == "{query}"
    assert config.reference.model == "7"
    assert config.proxy == parse_config(SOURCES).proxy


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("proxy.steps", "--set proxy.steps: expected key=value, for example --set proxy.steps=200"),
        ("=3", "--set =3: expected key=value, for example --set proxy.steps=200"),
        ("data_root.x=1", "--set data_root.x=1: data_root is not a section"),
        ("proxy.steps={", "--set proxy.steps={: the value is not YAML; quote it, for example --set 'key=\"a: b\"'"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"data_root": "here"}, [override])
    assert str(caught.value) == message


def test_merge_goes_into_sections():
    merged = merge({"proxy": {"steps": 1, "seed": 2}, "load": {}}, {"proxy": {"steps": 3}})
    assert merged == {"proxy": {"steps": 3, "seed": 2}, "load": {}}


def test_the_commented_config_is_the_default(tmp_path):
    text = write_commented(
        [{"path": "a: b#.json", "name": "a"}, {"path": "水.json", "name": "水"}], {"水.json": "alpaca"}
    )
    parsed = parse_config(yaml.safe_load(text))
    assert parsed == parse_config({"sources": [{"path": "a: b#.json", "name": "a"}, {"path": "水.json", "name": "水"}]})
    for name, field in Config.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            for key, setting in field.annotation.model_fields.items():
                assert setting.description, f"{name}.{key} has no description"
                assert f"  {setting.alias or key}: " in text


def test_config_file_paths_start_at_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sources: [{path: a.json}]\ndata_root: data\n")
    assert load_config_file(path)["data_root"] == str(tmp_path / "data")
    path.write_text("sources: [{path: a.json}]\ndata_root: /abs\n")
    assert load_config_file(path)["data_root"] == "/abs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must hold a mapping of sections, got list"),
        ("a: [", "is not YAML: while parsing a flow node"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config_file(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    with pytest.raises(ConfigError) as caught:
        load_config_file(Path("none.yaml"))
    assert str(caught.value) == "none.yaml: no such config file; write one with: doremi-mix init FILES --out none.yaml"
