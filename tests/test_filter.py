"""The stage filter on a corpus with planted defects: every row has one fate, with its reason."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from doremi_mix import learn
from doremi_mix.cli import app
from doremi_mix.errors import ConfigError, DataError
from doremi_mix.filters.analysis import PROBABILITIES

WORDS = [
    "river",
    "stone",
    "maple",
    "window",
    "copper",
    "garden",
    "letter",
    "winter",
    "candle",
    "bridge",
    "harbor",
    "meadow",
    "silver",
    "thunder",
    "orchard",
    "lantern",
    "market",
    "village",
    "feather",
    "compass",
    "anchor",
    "blanket",
    "cabin",
    "dragon",
    "engine",
    "forest",
    "glacier",
    "hammer",
    "island",
    "jungle",
]


def sentence(number, length=24):
    rng = random.Random(number)
    return " ".join(rng.choice(WORDS) for _ in range(length)).capitalize() + "."


def row(question, answer, **more):
    return {"instruction": question, "input": "", "output": answer, **more}


GOOD = [row(f"Tell me about {sentence(i, 6)}", sentence(1000 + i)) for i in range(40)]
NEAR = {**GOOD[9], "output": GOOD[9]["output"].replace(".", ", indeed.")}
COPIES = [
    *(row(f"Describe {sentence(500 + i, 6)}", sentence(2000 + i)) for i in range(20)),
    GOOD[0],  # 21: the same as good:1
    {**GOOD[1], "output": "  " + GOOD[1]["output"].upper() + "\n"},  # 22: the same but for case and white space
    NEAR,  # 23: nearly good:10
    row("Say it.", "No."),  # 24: too short
    row("What is to be filled in here, in this one row?", "It is nothing at all.", input="<noinput>"),  # 25
    row("Count these things for me, as many as there are.", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18"),  # 26
    COPIES_FIRST := row(f"Describe {sentence(500, 6)}", sentence(2000)),  # 27: the same as copies:1
]
CHINESE = [
    row(
        f"请介绍一下第{i}座城市的历史和文化",
        f"这座城市位于河流的第{i}个弯道旁边,人口大约有{i * 37 + 11}万,以{'茶丝瓷酒'[i % 4]}闻名。",
    )
    for i in range(25)
]
CORPUS = {"copies": COPIES, "good": GOOD, "城市": CHINESE}

FILTER = {
    "exact_duplicates": "spaces",
    "near_duplicates": 0.7,
    "priority": ["good"],
    "rules": {
        "placeholder_answer": {},
        "text_length": {"min": 20},
        "special_characters": {"max": 0.6},
    },
}
EXPECTED = {
    "copies:21": "exact_duplicate",
    "copies:22": "exact_duplicate",
    "copies:23": "near_duplicate",
    "copies:24": "text_length",
    "copies:25": "placeholder_answer",
    "copies:26": "special_characters",
    "copies:27": "exact_duplicate",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filter")
    for name, rows in CORPUS.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


def write_config(path, folder, settings, **sections):
    """Writes a config, whose YAML is JSON."""
    sources = [{"path": str(folder / f"{name}.json")} for name in CORPUS]
    path.write_text(json.dumps({"sources": sources, "filter": settings, **sections}), encoding="utf-8")
    return path


def doremi(*arguments):
    """Runs a command; returns its result."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def filtered(tmp_path, folder, settings=FILTER, **sections):
    """Loads and filters; returns the run directory."""
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", folder, settings, **sections)
    for stage in ("load", "filter"):
        done = doremi(stage, "--run-dir", run_dir, "--config", config)
        assert done.exit_code == 0, done.output
    return run_dir


@pytest.fixture(scope="module")
def run_dir(folder, tmp_path_factory):
    """A filtered run; read only."""
    return filtered(tmp_path_factory.mktemp("filtered"), folder)


def kept_ids(run_dir):
    return [i for name in CORPUS for i in pq.read_table(run_dir / "filter" / f"{name}.parquet")["id"].to_pylist()]


def rejections(run_dir):
    return {row["id"]: row for row in pq.read_table(run_dir / "filter" / "rejections.parquet").to_pylist()}


def all_ids():
    return [f"{name}:{i}" for name, rows in CORPUS.items() for i in range(1, len(rows) + 1)]


def test_each_row_is_kept_or_rejected_by_the_right_rule(run_dir):
    found = rejections(run_dir)
    assert {key: row["rule"] for key, row in found.items()} == EXPECTED
    assert kept_ids(run_dir) == [i for i in all_ids() if i not in EXPECTED]


def test_the_reason_names_the_value_or_the_survivor(run_dir):
    found = rejections(run_dir)
    assert found["copies:21"]["detail"] == "the same text as good:1"
    assert found["copies:27"]["detail"] == "the same text as copies:1"
    assert found["copies:21"]["value"] is None
    assert "to good:10, expected less than 0.7" in found["copies:23"]["detail"]
    assert 0.7 <= found["copies:23"]["value"] < 1
    assert found["copies:24"]["value"] == len("Say it.  No.")
    assert "12 characters" in found["copies:24"]["detail"]
    assert "20" in found["copies:24"]["detail"]


def test_rows_are_kept_as_they_were_loaded(run_dir):
    for name in CORPUS:
        loaded = pq.read_table(run_dir / "load" / f"{name}.parquet")
        kept = pq.read_table(run_dir / "filter" / f"{name}.parquet")
        assert kept.schema == loaded.schema
        by_id = {row["id"]: row for row in loaded.to_pylist()}
        assert all(by_id[row["id"]] == row for row in kept.to_pylist())


def test_the_summary_adds_up(run_dir):
    summary = json.loads((run_dir / "filter" / "summary.json").read_text(encoding="utf-8"))
    for domain in summary["domains"]:
        assert domain["num_rows"] == domain["num_kept"] + sum(domain["rejected"].values())
        assert domain["num_rows"] == len(CORPUS[domain["domain"]])
    assert summary["exact_duplicates"]["priority"] == ["good", "copies", "城市"]
    assert summary["exact_duplicates"]["lost_to"] == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert summary["near_duplicates"]["lost_to"] == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert [step["rule"] for step in summary["steps"]] == [
        "exact_duplicate", "placeholder_answer", "text_length", "special_characters", "near_duplicate",
    ]  # fmt: skip
    clusters = pq.read_table(run_dir / "filter" / "clusters" / "near_duplicates.parquet").to_pylist()
    assert [(row["id"], row["kept"], row["survivor"]) for row in clusters] == [
        ("good:10", True, "good:10"),
        ("copies:23", False, "good:10"),
    ]


def test_priority_decides_who_keeps_a_shared_row(tmp_path, folder):
    found = rejections(filtered(tmp_path, folder, {**FILTER, "priority": ["copies"]}))
    assert found["good:1"]["detail"] == "the same text as copies:21"
    assert "good:10" in found
    assert "copies:21" not in found


def score_files(run_dir):
    return {path: path.stat().st_mtime_ns for path in (run_dir / "scores").rglob("*.parquet")}


def test_another_threshold_reads_scores_and_computes_none(tmp_path, folder):
    run_dir = filtered(tmp_path, folder)
    before = score_files(run_dir)
    assert before
    done = doremi("filter", "--run-dir", run_dir, "--set", "filter.rules.text_length.min=5")
    assert done.exit_code == 0, done.output
    assert "copies:24" in kept_ids(run_dir)
    done = doremi("filter", "--run-dir", run_dir, "--set", "filter.rules.text_length=null")
    assert done.exit_code == 0, done.output
    after = score_files(run_dir)
    # The row that is kept now needs a signature of its own; nothing was computed anew.
    assert {path: after[path] for path in before} == before
    assert all("signature" in str(path) for path in after.keys() - before.keys())


def test_the_rest_of_the_pipeline_reads_what_was_kept(tmp_path, folder, small_settings):
    weights = learn(
        [folder / f"{name}.json" for name in CORPUS],
        tmp_path / "run",
        token_budget=3000,
        quiet=True,
        filter=FILTER,
        **small_settings,
    )
    assert set(weights.domain_weights) == set(CORPUS)
    kept = set(kept_ids(tmp_path / "run"))
    texts = {(row["instruction"], row["output"]) for i, row in loaded_rows() if i in kept}
    with (tmp_path / "run" / "mixture" / "mixture.jsonl").open(encoding="utf-8") as file:
        drawn = [json.loads(line) for line in file]
    assert drawn
    assert all((row["instruction"], row["output"]) in texts for row in drawn)
    summary = json.loads((tmp_path / "run" / "tokenize" / "domains.json").read_text(encoding="utf-8"))
    assert "城市" in json.dumps(summary, ensure_ascii=False)
    assert (tmp_path / "run" / "analyze" / "statistics.json").exists()


def loaded_rows():
    return [(f"{name}:{i}", row) for name, rows in CORPUS.items() for i, row in enumerate(rows, 1)]


def test_nothing_is_filtered_unless_asked_for(finished_run):
    assert not (finished_run / "filter").exists()
    assert not (finished_run / "analyze").exists()


def test_a_domain_of_which_nothing_is_left_is_an_error_and_leaves_no_half_result(tmp_path, folder):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", folder, {"rules": {"text_length": {"min": 100}}})
    assert doremi("load", "--run-dir", run_dir, "--config", config).exit_code == 0
    done = doremi("filter", "--run-dir", run_dir)
    assert done.exit_code == 1
    assert not (run_dir / "filter").exists()
    with pytest.raises(
        DataError, match=r"城市: none of its 25 rows is left after filtering \(text_length 25\); loosen"
    ):
        learn(
            [folder / f"{n}.json" for n in CORPUS], run_dir, quiet=True, filter={"rules": {"text_length": {"min": 100}}}
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": {"text_lenght": {"min": 3}}}, r"text_lenght.*did you mean.*text_length"),
        ({"rules": {"text_length": {"mim": 3}}}, r"unknown key filter\.rules\.text_length\.mim; did you mean"),
        ({"rules": {"text_length": {"min": 9, "max": 3}}}, r"filter\.rules\.text_length: min 9 is larger than max 3"),
        ({"rules": {"languages": {}}}, r"filter\.rules\.languages: allowed is empty"),
        (
            {"preset": "ke_data_juicer"},
            r"filter\.rules\.perplexity of the preset ke_data_juicer needs a language model",
        ),
        ({"preset": "ke_data_jucer"}, r"filter\.preset must be"),
        ({"priority": ["nobody"]}, r"filter\.priority: 'nobody' is no domain; the domains: copies, good, 城市"),
        ({"rules": {"flagged_words": {"max": 0.1}}}, r"filter\.rules\.flagged_words needs a list of words"),
        ({"models": ["m/m"], "min_votes": 2, "exact_duplicates": "text"}, r"filter\.min_votes is 2, more than the 1"),
        ({"models": ["m/m", "m/m"], "exact_duplicates": "text"}, r"filter\.models names a model twice"),
        ({"models": [1]}, r"filter\.models\[0\] must be"),
        ({"rules": {"text_length": 20}}, r"filter\.rules\.text_length must be thresholds, for example \{min: 20, max"),
        ({"priority": "nobody"}, r"filter\.priority: 'nobody' is no domain"),
        (
            {"exact_duplicates": "text", "executor": "hosts"},
            r"filter\.num_hosts is 1, but filter\.executor hosts shares",
        ),
        (
            {"num_examples": 5, "diversity": "facility_location", "quality_weighted": True, "models": ["m/m"]},
            r"filter\.quality_weighted goes with filter\.diversity k_center",
        ),
    ],
)
def test_settings_that_cannot_work_are_found_before_anything_is_written(tmp_path, folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        learn([folder / f"{name}.json" for name in CORPUS], tmp_path / "run", quiet=True, filter=settings)
    assert not (tmp_path / "run").exists()


def test_a_word_list_counts_its_words(tmp_path, folder):
    words = tmp_path / "words.txt"
    words.write_text("nothing\nAll\n\n", encoding="utf-8")
    settings = {"flagged_words": str(words), "rules": {"flagged_words": {"max": 0.1}}}
    found = rejections(filtered(tmp_path, folder, settings))
    assert {key: row["rule"] for key, row in found.items()} == {"copies:25": "flagged_words"}


def test_quantiles_are_those_of_each_domain(tmp_path, folder):
    settings = {"rules": {"text_length": {"min_quantile": 0.25, "max_quantile": 0.75}}}
    run_dir = filtered(tmp_path, folder, settings)
    kept = kept_ids(run_dir)
    for name, rows in CORPUS.items():
        lengths = np.array([len(f"{row['instruction']} {row['input']} {row['output']}") for row in rows])
        low, high = np.quantile(lengths, [0.25, 0.75])
        expected = [f"{name}:{i}" for i, length in enumerate(lengths, 1) if low <= length <= high]
        assert [i for i in kept if i.startswith(f"{name}:")] == expected


@pytest.mark.parametrize("num_shards", [1, 3])
def test_diverse_examples_of_each_domain(tmp_path, folder, num_shards):
    settings = {"num_examples": 5, "per_domain": True, "diversity_shards": num_shards}
    run_dir = filtered(tmp_path, folder, settings)
    kept = kept_ids(run_dir)
    assert [sum(i.startswith(f"{name}:") for i in kept) for name in CORPUS] == [5, 5, 5]
    assert len(kept) + len(rejections(run_dir)) == len(all_ids())
    assert {row["rule"] for row in rejections(run_dir).values()} == {"diversity"}


def test_the_table_and_the_rejections_are_shown(run_dir):
    shown = doremi("filter", "--run-dir", run_dir)
    assert shown.exit_code == 0, shown.output
    for text in (
        "copies",
        "城市",
        "exact",
        "doremi-mix rejections",
        "shared rows stay with the first of: good, copies",
    ):
        assert text in shown.output
    found = json.loads(doremi("rejections", "--run-dir", run_dir, "--rule", "exact_duplicate", "--json").stdout)
    assert [row["id"] for row in found] == ["copies:21", "copies:22", "copies:27"]
    assert found[0]["text"] == f"{GOOD[0]['instruction']}  {GOOD[0]['output']}"
    wrong = doremi("rejections", "--run-dir", run_dir, "--rule", "nothing")
    assert wrong.exit_code == 1
    assert "no rejected row has the rule 'nothing'; there are: exact_duplicate, near_duplicate" in wrong.output
    read = doremi("rejections", "--run-dir", run_dir, "--domain", "copies", "--num", "2")
    assert read.exit_code == 0
    assert "copies:2" in read.output


def test_analysis_before_filtering(tmp_path, folder):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", folder, {})
    assert doremi("load", "--run-dir", run_dir, "--config", config).exit_code == 0
    shown = doremi("analyze", "--run-dir", run_dir)
    assert shown.exit_code == 0, shown.output
    statistics = json.loads((run_dir / "analyze" / "statistics.json").read_text(encoding="utf-8"))
    copies = statistics["domains"]["copies"]
    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in COPIES]
    assert copies["num_rows"] == len(COPIES)
    assert copies["num_duplicates"] == 1
    assert copies["totals"]["text_len"] == sum(map(len, texts))
    assert copies["quantiles"]["text_len"][PROBABILITIES.index(0.5)] == np.median([len(text) for text in texts])
    assert copies["flags"]["placeholder_answer"] == 1
    assert copies["longest"][0]["characters"] == max(map(len, texts))
    assert max(statistics["domains"]["城市"]["languages"], key=statistics["domains"]["城市"]["languages"].get) == "zh"
    overlap = statistics["overlap"]
    assert overlap["domains"] == list(CORPUS)
    assert overlap["shared_texts"][0][1] == overlap["shared_texts"][1][0] == 2
    assert "copies" in shown.output


def test_what_was_kept_is_described_like_what_was_loaded(tmp_path, folder):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", folder, FILTER)
    for stage in ("load", "analyze", "filter"):
        done = doremi(stage, "--run-dir", run_dir, "--config", config)
        assert done.exit_code == 0, done.output
    before = json.loads((run_dir / "analyze" / "statistics.json").read_text(encoding="utf-8"))
    after = json.loads((run_dir / "filter" / "statistics.json").read_text(encoding="utf-8"))["kept"]
    assert after.keys() == before.keys()
    assert before["domains"]["copies"]["num_rows"] == len(COPIES)
    assert after["domains"]["copies"]["num_rows"] == len(COPIES) - len(EXPECTED)
    assert after["domains"]["copies"]["num_duplicates"] == 0
    assert after["domains"]["copies"]["flags"]["placeholder_answer"] == 0
    assert after["overlap"]["shared_texts"] == [[20, 0, 0], [0, 40, 0], [0, 0, 25]]
    assert "What was kept" in done.output


def test_a_preset_says_what_it_leaves_out(tmp_path, folder):
    settings = {"preset": "data_juicer_refine", "rules": {"maximum_line_length": None}}
    run_dir = filtered(tmp_path, folder, settings)
    summary = json.loads((run_dir / "filter" / "summary.json").read_text(encoding="utf-8"))
    assert any("flagged_words is left out" in note for note in summary["notes"])
    by_rule = [(rule["rule"], rule["applies"], rule["min"]) for rule in summary["plan"]["rules"]]
    assert ("text_length", "other", 30) in by_rule
    assert ("text_length", "zh", 10) in by_rule
    assert "maximum_line_length" not in [rule for rule, *_ in by_rule]
    # Chinese rows are shorter than 30 characters and stay; the short English one goes.
    assert "copies:24" in rejections(run_dir)


def test_models_vote_and_a_run_of_ours_is_one(tmp_path, folder, finished_run):
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    settings = {
        "models": [str(finished_run), str(other)],
        "rules": {"perplexity": {"max_quantile": 0.5}, "instruction_following_difficulty": {"max": 50}},
    }
    run_dir = filtered(tmp_path, folder, settings)
    found = rejections(run_dir)
    counts = {name: sum(key.startswith(f"{name}:") for key in found) for name in CORPUS}
    assert counts == {name: len(rows) // 2 for name, rows in CORPUS.items()}
    statistics = json.loads((run_dir / "filter" / "statistics.json").read_text(encoding="utf-8"))
    scored = statistics["scored"]["domains"]["good"]["quantiles"]["perplexity"]
    assert scored == sorted(scored)
    assert scored[0] > 1
    kept = statistics["kept"]["domains"]["good"]["quantiles"]["perplexity"]
    assert kept[-1] == pytest.approx(scored[PROBABILITIES.index(0.5)], rel=0.2)
    before = score_files(run_dir)
    voted = doremi("filter", "--run-dir", run_dir, "--set", "filter.min_votes=2")
    assert voted.exit_code == 0, voted.output
    assert score_files(run_dir) == before
    assert set(rejections(run_dir)) == set(found)
    assert "of 2 models find it within the range" in next(iter(rejections(run_dir).values()))["detail"]


def test_a_run_without_a_model_cannot_score(tmp_path, folder, run_dir):
    settings = {"models": [str(run_dir)], "rules": {"perplexity": {"max": 1000}}}
    with pytest.raises(RuntimeError, match=r"this run has no reference model yet; run: doremi-mix reference --run-dir"):
        learn([folder / f"{name}.json" for name in CORPUS], tmp_path / "run", quiet=True, filter=settings)


def test_weighting_by_quality_asks_the_models(tmp_path, folder, finished_run):
    settings = {"models": [str(finished_run)], "num_examples": 30, "quality_weighted": True}
    run_dir = filtered(tmp_path, folder, settings)
    assert len(kept_ids(run_dir)) == 30
    assert Path(run_dir / "scores").exists()


def test_off_is_a_word_in_yaml_too(tmp_path, folder):
    settings = {"preset": "data_juicer_refine", "exact_duplicates": False, "near_duplicates": "off"}
    run_dir = filtered(tmp_path, folder, settings)
    summary = json.loads((run_dir / "filter" / "summary.json").read_text(encoding="utf-8"))
    assert summary["plan"]["exact_duplicates"] is None
    assert summary["plan"]["near_duplicates"] is None


def test_a_run_cannot_be_filtered_by_itself(tmp_path, folder):
    run_dir = filtered(tmp_path, folder)
    done = doremi("run", tmp_path / "config.yaml", "--run-dir", run_dir, "--set", f"filter.models=[{run_dir}]")
    assert done.exit_code == 1
    assert "is this very run, whose reference model is trained on what it would filter" in done.output


def test_a_filter_that_has_finished_needs_its_word_list_no_more(tmp_path, folder, small_settings):
    words = tmp_path / "words.txt"
    words.write_text("nothing\n", encoding="utf-8")
    settings = {"flagged_words": str(words), "rules": {"flagged_words": {"max": 0.1}}}
    run_dir = filtered(tmp_path, folder, settings, tokenize=small_settings["tokenize"])
    words.unlink()
    assert "finished" in doremi("status", "--run-dir", run_dir).output
    done = doremi("tokenize", "--run-dir", run_dir)
    assert done.exit_code == 0, done.output
    done = doremi("filter", "--run-dir", run_dir, "--set", "filter.rules.flagged_words.max=0.2")
    assert done.exit_code == 1
    assert "words.txt: there is no such file" in done.output


def test_rules_of_a_new_config_take_the_place_of_those_before(tmp_path, folder):
    run_dir = filtered(tmp_path, folder)
    config = write_config(tmp_path / "new.yaml", folder, {"rules": {"text_length": {"max": 600}}})
    done = doremi("filter", "--run-dir", run_dir, "--config", config)
    assert done.exit_code == 0, done.output
    summary = json.loads((run_dir / "filter" / "summary.json").read_text(encoding="utf-8"))
    assert [(rule["rule"], rule["min"], rule["max"]) for rule in summary["plan"]["rules"]] == [
        ("text_length", None, 600)
    ]


def test_rejections_of_rows_that_were_loaded_anew_are_not_shown(tmp_path, folder):
    run_dir = filtered(tmp_path, folder)
    (folder_of_others := tmp_path / "others").mkdir()
    for name, rows in CORPUS.items():
        (folder_of_others / f"{name}.json").write_text(json.dumps(rows[::-1], ensure_ascii=False), encoding="utf-8")
    config = write_config(tmp_path / "others.yaml", folder_of_others, FILTER)
    assert doremi("load", "--run-dir", run_dir, "--config", config).exit_code == 0
    shown = doremi("rejections", "--run-dir", run_dir)
    assert shown.exit_code == 1
    assert "is older than what was loaded; run: doremi-mix filter --run-dir" in shown.output


def test_quantiles_of_a_script_are_those_of_its_rows(tmp_path):
    rows = [row(f"Say {sentence(i, 5)}", sentence(i, 30 + i)) for i in range(20)]
    rows += [row(f"说说第{i}个城市", "城" * (20 + i)) for i in range(20)]
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in CORPUS:
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    run_dir = filtered(tmp_path, folder, {"rules": {"text_length": {"max_quantile": 0.5, "applies": "zh"}}})
    assert list(rejections(run_dir)) == [f"{name}:{i}" for name in CORPUS for i in range(31, 41)]


def test_other_models_choose_other_examples(tmp_path, folder, finished_run):
    settings = {"models": [str(finished_run)], "num_examples": 30, "quality_weighted": True}
    run_dir = filtered(tmp_path, folder, settings)
    assert "up to date" in doremi("filter", "--run-dir", run_dir).output
    for change in ("filter.ifd=perplexity_ratio", "filter.max_model_tokens=32"):
        done = doremi("filter", "--run-dir", run_dir, "--set", change)
        assert done.exit_code == 0, done.output
        assert "up to date" not in done.output


def test_system_prompts_tell_rows_apart(tmp_path):
    chat = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "It is " + sentence(1)}]
    rows = [{"messages": [{"role": "system", "content": f"You are {name}."}, *chat]} for name in ("Ann", "Bob", "Ann")]
    folder = tmp_path / "chats"
    folder.mkdir()
    for name in CORPUS:
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", folder, {"exact_duplicates": "text"})
    for stage in ("load", "filter"):
        doremi(stage, "--run-dir", run_dir, "--config", config)
    # Two of the nine are new; the other domains are left without rows, which is an error of its own.
    done = doremi("filter", "--run-dir", run_dir)
    assert "exact_duplicate 3); put it first in filter.priority or loosen filter.exact_duplicates" in done.output
    assert "; the same holds for 城市" in done.output


def test_the_config_that_a_run_keeps_makes_the_same_filter(tmp_path, folder):
    settings = {"preset": "data_juicer_refine", "rules": {"alphanumeric": {"max": 0.99}}}
    run_dir = filtered(tmp_path, folder, settings)
    other = tmp_path / "other"
    for stage in ("load", "filter"):
        done = doremi(stage, "--run-dir", other, "--config", run_dir / "config.yaml")
        assert done.exit_code == 0, done.output
    plans = [
        json.loads((place / "filter" / "summary.json").read_text(encoding="utf-8"))["plan"]
        for place in (run_dir, other)
    ]
    assert plans[0] == plans[1]
    (rule,) = [rule for rule in plans[1]["rules"] if rule["rule"] == "alphanumeric"]
    assert (rule["min"], rule["max"]) == (0.1, 0.99)


def test_a_recipe_is_kept_by_the_run(tmp_path, folder, small_settings):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("process:\n  - text_length_filter:\n      min_len: 20\n", encoding="utf-8")
    run_dir = filtered(tmp_path, folder, {"recipe": str(recipe)}, tokenize=small_settings["tokenize"])
    assert {key: row["rule"] for key, row in rejections(run_dir).items()} == {"copies:24": "text_length"}
    moved = recipe.rename(tmp_path / "moved.yaml")
    assert "filter            finished" in doremi("status", "--run-dir", run_dir).output
    done = doremi("tokenize", "--run-dir", run_dir)
    assert done.exit_code == 0, done.output
    assert "filter: up to date" in doremi("filter", "--run-dir", run_dir, "--set", f"filter.recipe={moved}").output
    done = doremi("filter", "--run-dir", run_dir, "--set", f"filter.recipe={recipe}")
    assert done.exit_code == 1
    assert "recipe.yaml: no such config file" in done.output


def test_rejections_of_other_settings_are_told(tmp_path, folder):
    run_dir = filtered(tmp_path, folder)
    assert "note:" not in doremi("rejections", "--run-dir", run_dir).output
    failing = doremi("filter", "--run-dir", run_dir, "--set", "filter.rules.text_length.min=100000")
    assert "; the same holds for good, 城市" in failing.output
    # They were refused, and are forgotten; those that a stage took are not.
    assert "note:" not in doremi("rejections", "--run-dir", run_dir).output
    doremi("load", "--run-dir", run_dir, "--set", "filter.rules.text_length.min=100000")
    assert "the settings have changed since" in doremi("rejections", "--run-dir", run_dir).output


def test_a_rule_is_switched_on_and_off_by_true_and_false(tmp_path, folder):
    settings = {"preset": "ke_data_juicer", "num_examples": "off", "exact_duplicates": "off"}
    rules = {"perplexity": False, "instruction_following_difficulty": None, "language_id_score": False}
    rules |= {"placeholder_answer": True, "languages": {"allowed": "zh"}}
    run_dir = filtered(tmp_path, folder, {**settings, "rules": {**rules, "languages": None}})
    summary = json.loads((run_dir / "filter" / "summary.json").read_text(encoding="utf-8"))
    assert [rule["rule"] for rule in summary["plan"]["rules"]] == ["placeholder_answer", "text_length"]
    done = doremi("filter", "--run-dir", run_dir, "--set", "filter.rules.languages.allowed=[en, zh]")
    assert done.exit_code == 0, done.output
