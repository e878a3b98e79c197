"""The whole pipeline on a small corpus: its artifacts, what is remade when, and that the bytes repeat."""

import gzip
import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import read_log

from doremi_mix import DomainWeights, learn
from doremi_mix.errors import BudgetError, ConfigError, DivergedError
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages import STAGE_NAMES, STAGES
from doremi_mix.stages.load import read_examples
from doremi_mix.stages.tokenize import make_template
from doremi_mix.stages.training import open_store
from doremi_mix.tokenizer import load_tokenizer
from doremi_mix.tokens import CONTEST_TEMPLATE, count_tokens


def test_readme_example(corpus, tmp_path, small_settings):
    from doremi_mix import learn

    weights = learn(corpus, tmp_path / "run", token_budget=4000, quiet=True, **small_settings)
    assert isinstance(weights, DomainWeights)
    assert math.fsum(weights.domain_weights.values()) == pytest.approx(1, abs=1e-9)
    assert set(weights.domain_weights) == {"fruit", "metal", "水"}
    assert weights["fruit"] == weights.domain_weights["fruit"]


def test_weights_are_the_average_of_the_trajectory(finished_run):
    weights = DomainWeights.from_dict(read_json(finished_run / "weights" / "domain_weights.json"))
    log = read_log(finished_run / "proxy" / "trajectory.jsonl")
    assert [point["step"] for point in log] == list(range(1, 13))
    for name in ("fruit", "metal", "水"):
        average = math.fsum(point["domain_weights"][name] for point in log) / 12
        assert weights.domain_weights[name] == pytest.approx(average, abs=1e-12)
    for point in log:
        assert math.fsum(point["domain_weights"].values()) == pytest.approx(1, abs=1e-12)
        for name, excess in point["excess_loss"].items():
            difference = point["proxy_loss"][name] - point["reference_loss"][name]
            assert point["unclipped_excess_loss"][name] == pytest.approx(difference, abs=1e-9)
            assert excess >= max(0, difference) - 1e-9


def test_the_first_update_is_algorithm_1(finished_run):
    """alpha_1 from uniform weights and the first excess losses, in plain Python."""
    first = read_log(finished_run / "proxy" / "trajectory.jsonl")[0]
    raised = {name: math.exp(excess) / 3 for name, excess in first["excess_loss"].items()}
    for name, weight in first["domain_weights"].items():
        assert weight == pytest.approx(0.999 * raised[name] / sum(raised.values()) + 0.001 / 3, abs=1e-12)


def test_shares_describe_the_same_mixture_in_other_units(finished_run):
    weights = DomainWeights.from_dict(read_json(finished_run / "weights" / "domain_weights.json"))
    store = open_store(RunDirectory(finished_run))
    per_example = {s["name"]: s["available_tokens"] / s["train"]["documents"] for s in store.summaries}
    tokens = {name: share * per_example[name] for name, share in weights.shares["example"].items()}
    total = sum(tokens.values())
    for name, weight in weights.domain_weights.items():
        assert tokens[name] / total == pytest.approx(weight, abs=1e-12)
    assert weights.shares["token"] == weights.domain_weights
    assert set(weights.provenance["inputs"]) == {"fruit", "metal", "水"}


def test_mixture_is_input_rows_and_within_the_budget(finished_run, corpus):
    rows = read_log(finished_run / "mixture" / "mixture.jsonl")
    allocation = read_json(finished_run / "mixture" / "allocation.json")
    store = open_store(RunDirectory(finished_run))
    tokenizer = load_tokenizer(str(finished_run / "tokenize" / "bpe" / "tokenizer.json"))
    total = 0
    for domain_id, name in enumerate(store.domains):
        source = json.loads((corpus / f"{name}.json").read_text(encoding="utf-8"))
        mine = [{key: row[key] for key in row if key != "domain"} for row in rows if row["domain"] == name]
        assert all(row in source for row in mine)
        examples = [e for chunk in read_examples(finished_run / "load", name) for e in chunk]
        lengths = count_tokens(examples, tokenizer, CONTEST_TEMPLATE, None)
        by_row = {e.row: int(n) for e, n in zip(examples, lengths, strict=True)}
        recounted = sum(by_row[json.dumps(row, ensure_ascii=False, separators=(",", ":"))] for row in mine)
        assert recounted == allocation["domains"][name]["drawn_tokens"]
        allocated = allocation["domains"][name]["allocated_tokens"]
        assert allocated - lengths.max() < recounted <= allocated
        total += recounted
        held_out = [
            e.row
            for e, flag in zip(
                examples, store.example_held_out[slice(*_bounds(store.document_ids(domain_id)))], strict=True
            )
            if flag
        ]
        assert held_out
        assert not [row for row in mine if json.dumps(row, ensure_ascii=False, separators=(",", ":")) in held_out]
    assert total == allocation["drawn_tokens"] <= 5000
    ratio = read_json(finished_run / "mixture" / "ratio.json")
    assert list(ratio) == ["fruit.jsonl", "metal.jsonl", "水.jsonl"]
    assert sum(ratio.values()) == pytest.approx(1)
    # Shuffled across domains.
    assert [row["domain"] for row in rows] != sorted(row["domain"] for row in rows)


def _bounds(ids):
    return ids.start, ids.stop


# What learn runs; the others are asked for.
ASKED_FOR = ("analyze", "filter", "compare", "export", "finetune", "evaluate")
RUN_STAGES = [name for name in STAGE_NAMES if name not in ASKED_FOR]


def manifests(run_dir):
    return {name: (run_dir / name / "manifest.json").stat().st_mtime_ns for name in RUN_STAGES}


def test_same_seed_same_bytes_other_seed_other_trajectory(finished_run, corpus, small_settings, tmp_path):
    learn(corpus, tmp_path / "same", token_budget=5000, quiet=True, **small_settings)
    for name in (
        "weights/domain_weights.json",
        "proxy/trajectory.jsonl",
        "mixture/mixture.jsonl",
        "weights/weights.png",
    ):
        assert (tmp_path / "same" / name).read_bytes() == (finished_run / name).read_bytes(), name
    shutil.copytree(finished_run, tmp_path / "other")
    settings = {**small_settings, "proxy": {**small_settings["proxy"], "seed": 1}}
    learn(corpus, tmp_path / "other", token_budget=5000, quiet=True, **settings)
    name = "proxy/trajectory.jsonl"
    assert (tmp_path / "other" / name).read_bytes() != (finished_run / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({}, set()),
        ({"mixture": {"seed": 1}}, {"mixture"}),
        ({"proxy": {"step_size": 0.5}}, {"proxy", "weights", "mixture"}),
        ({"proxy": {"token_budget": 4000}}, {"proxy", "weights", "mixture"}),
        ({"weights": {"shrink": 0.5}}, {"weights", "mixture"}),
        ({"mixture": {"weights": "natural"}}, {"mixture"}),
        ({"proxy": {"seed": 1}}, {"reference_losses", "proxy", "weights", "mixture"}),
        ({"proxy": {"checkpoint_every": 3, "gradient_accumulation_steps": 2}}, set()),
        ({"reference": {"seed": 1}}, {"reference", "reference_losses", "proxy", "weights", "mixture"}),
        ({"tokenize": {"seed": 1}}, set(RUN_STAGES) - {"load"}),
        ({"load": {"max_rejected_share": 0.4}, "proxy": {"trust_remote_code": True}}, set()),
    ],
)
def test_a_setting_remakes_what_depends_on_it(finished_run, corpus, small_settings, tmp_path, change, remade):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    before = manifests(run_dir)
    settings = {key: {**small_settings.get(key, {}), **change.get(key, {})} for key in {*small_settings, *change}}
    learn(corpus, run_dir, token_budget=5000, quiet=True, **settings)
    after = manifests(run_dir)
    assert {name for name in RUN_STAGES if before[name] != after[name]} == remade


def test_headroom_from_files_to_weights(corpus, small_settings, tmp_path):
    """Half of the reference's steps, the last line of the trajectory, held-out text for what the reference repeats."""
    reference = {**small_settings["reference"], "steps": 40}
    settings = {**small_settings, "reference": reference, "proxy": {"checkpoint_every": 7}}
    weights = learn(corpus, tmp_path / "run", quiet=True, **settings)
    assert weights.method == "headroom"
    assert weights.reference_weights == pytest.approx(dict.fromkeys(("fruit", "metal", "水"), 1 / 3))
    log = read_log(tmp_path / "run" / "proxy" / "trajectory.jsonl")
    assert len(log) == 20
    metrics = {stage: read_json(tmp_path / "run" / stage / "metrics.json") for stage in ("reference", "proxy")}
    losses = {stage: {n: loss["loss"] for n, loss in m["held_out_loss"].items()} for stage, m in metrics.items()}
    epochs = metrics["reference"]["epochs"]
    assert epochs["fruit"] < 1 < epochs["水"]
    average = read_json(tmp_path / "run" / "proxy" / "average.json")
    held_out = {name: losses["proxy"][name] - losses["reference"][name] for name in average}
    # Repeated domains stand to each other as their held-out losses do.
    repeated = [name for name in average if epochs[name] > 1]
    floor = 1e-3 / 3
    for name in repeated:
        ratio = (average[name] - floor) / (average["水"] - floor)
        assert ratio == pytest.approx(max(held_out[name], 0) / held_out["水"], rel=1e-9)
    # Exported: half of the way from uniform.
    for name, weight in average.items():
        assert weights[name] == pytest.approx(0.5 * weight + 0.5 / 3, abs=1e-12)


def test_other_containers_of_the_same_rows_give_the_same_weights(finished_run, corpus, small_settings, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = {
        name: json.loads((corpus / f"{name}.json").read_text(encoding="utf-8")) for name in ("fruit", "metal", "水")
    }
    with gzip.open(folder / "fruit.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows["fruit"])
    pq.write_table(pa.Table.from_pylist(rows["metal"]), folder / "metal.parquet")
    shutil.copy(corpus / "水.json", folder)
    learn(folder, tmp_path / "run", token_budget=5000, quiet=True, **small_settings)
    mine, theirs = (read_json(run / "weights" / "domain_weights.json") for run in (tmp_path / "run", finished_run))
    assert mine["domain_weights"] == theirs["domain_weights"]
    name = "mixture/mixture.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (finished_run / name).read_bytes()


def test_an_impossible_budget_stops_before_training(corpus, small_settings, tmp_path):
    with pytest.raises(
        BudgetError,
        match=r"^token budget 1,000,000,000 is impossible: .*; lower the token budget to 4\d,\d{3} or raise mix",
    ):
        learn(corpus, tmp_path / "run", token_budget=10**9, quiet=True, **small_settings)
    assert not (tmp_path / "run" / "reference").exists()


def test_a_diverging_run_says_what_to_lower(corpus, small_settings, tmp_path):
    settings = {**small_settings, "reference": {**small_settings["reference"], "learning_rate": 1e30}}
    with pytest.raises(DivergedError) as caught:
        learn(corpus, tmp_path / "run", quiet=True, **settings)
    found = re.fullmatch(
        r"reference: the (?:loss|gradient) is not finite at step (\d+) of 12; "
        r"lower reference\.learning_rate \(it is 1e\+30\)",
        str(caught.value),
    )
    assert found
    # What came before is in the log, to be looked at.
    lines = read_log(tmp_path / "run" / "reference" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, int(found[1])))
    assert all(math.isfinite(line["loss"]) for line in lines)
    learn(corpus, tmp_path / "run", quiet=True, **small_settings)


def test_reference_weights_can_be_given(corpus, small_settings, tmp_path):
    reference = {**small_settings["reference"], "weights": {"fruit": 1, "metal": 1, "水": 2}}
    weights = learn(corpus, tmp_path / "run", quiet=True, **{**small_settings, "reference": reference})
    assert weights.reference_weights == {"fruit": 0.25, "metal": 0.25, "水": 0.5}
    reference["weights"] = {"fruit": 1, "gold": 1}
    with pytest.raises(ConfigError) as caught:
        learn(corpus, tmp_path / "run", quiet=True, **{**small_settings, "reference": reference})
    assert "reference.weights: " in str(caught.value)
    assert "['fruit', 'metal', '水']" in str(caught.value)


def test_a_batch_smaller_than_the_domains_is_refused(corpus, small_settings, tmp_path):
    with pytest.raises(ConfigError) as caught:
        learn(
            corpus, tmp_path / "run", quiet=True, **{**small_settings, "proxy": {"method": "doremi", "batch_size": 2}}
        )
    assert str(caught.value) == (
        "proxy.batch_size is 2, fewer than the 3 domains, each of which must be in every batch; raise it to 3 or more"
    )


def test_rows_with_a_domain_of_their_own_keep_it(small_settings, tmp_path):
    for name in ("a", "b"):
        rows = [{"instruction": f"count {i}", "output": "one two three", "domain": "theirs"} for i in range(40)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    learn(paths, tmp_path / "run", token_budget=500, quiet=True, **small_settings)
    rows = read_log(tmp_path / "run" / "mixture" / "mixture.jsonl")
    assert {row["domain"] for row in rows} == {"theirs"}
    assert {row["doremi_mix_domain"] for row in rows} == {"a", "b"}
    assert read_json(tmp_path / "run" / "mixture" / "allocation.json")["domain_key"] == "doremi_mix_domain"


def test_max_example_tokens_bounds_what_is_counted(corpus, small_settings, tmp_path):
    settings = {**small_settings, "tokenize": {**small_settings["tokenize"], "max_example_tokens": 40}}
    learn(corpus, tmp_path / "run", token_budget=3000, quiet=True, **settings)
    store = open_store(RunDirectory(tmp_path / "run"))
    assert int(np.max(store.example_tokens)) == 40
    allocation = read_json(tmp_path / "run" / "mixture" / "allocation.json")
    assert allocation["unit"] == "tokens, after the prompt template and with the end token, cut at 40"


def test_the_table_reads_only_earlier_stages():
    for position, stage in enumerate(STAGES):
        assert set(stage.reads) <= set(STAGE_NAMES[:position])


def test_templates_can_be_given():
    from doremi_mix.config import TokenizeConfig

    assert make_template(TokenizeConfig()) == CONTEST_TEMPLATE
    template = make_template(TokenizeConfig(preamble="", turn="Q: {query}\nA: "))
    assert (template.preamble, template.turn) == ("", "Q: {query}\nA: ")
