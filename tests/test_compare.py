"""Stage compare on a small corpus: a fair contest, a verdict that travels, refusals, and kills that change nothing."""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import read_log
from test_cli import assert_one_line, invoke
from test_resume import KILL_AT

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.pipeline import resolve
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages import compare, training
from doremi_mix.stages.training import open_store

NAMES = ("fruit", "metal", "水")
PLAIN = ("natural", "uniform", "temperature")
BUDGET = 10_000
SKEWED = {"fruit": 100, "metal": 100, "水": 800}
"""In any unit; the last domain cannot fill its share."""


class Watch:
    """What each model of a comparison was trained on, and from where it started."""

    def __init__(self, patch):
        self.schedules = {}
        self.sections = {}
        self.starts = {}
        train_model, new_model = compare.train_model, training.new_model

        def train(context, section, objective, schedule, reference_losses=None, part=""):
            self.schedules[part], self.sections[part] = schedule, section
            self.part = part
            return train_model(context, section, objective, schedule, reference_losses, part)

        def new(section, *args):
            model = new_model(section, *args)
            content = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
            self.starts[self.part] = hashlib.sha256(content).hexdigest()
            return model

        patch.setattr(compare, "train_model", train)
        patch.setattr(training, "new_model", new)


@pytest.fixture(scope="module")
def entered(finished_run, tmp_path_factory):
    """Two files of weights: a plain one, and a copy of the learned weights."""
    folder = tmp_path_factory.mktemp("entered")
    (folder / "skewed.json").write_text(json.dumps(SKEWED), encoding="utf-8")
    shutil.copy(finished_run / "weights" / "domain_weights.json", folder / "same.json")
    return folder


def options(folder):
    entries = (f"{name}={folder / name}.json" for name in ("skewed", "same"))
    return ("--seeds", "2", f"--set=compare.token_budget={BUDGET}", *(text for e in entries for text in ("--also", e)))


@pytest.fixture(scope="module")
def compared(finished_run, entered, tmp_path_factory):
    """A finished comparison of six mixtures with two seeds (read only), what it was trained on and what it printed."""
    run_dir = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(finished_run, run_dir)
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        result = invoke("compare", "--run-dir", run_dir, *options(entered))
    assert result.exit_code == 0, result.stderr
    return run_dir, watch, result


@pytest.fixture(scope="module")
def results(compared):
    return read_json(compared[0] / "compare" / "results.json")


# --- The contest.


def test_results_name_every_mixture(compared, results):
    run_dir, _, printed = compared
    assert set(results) == {
        *("unit", "token_budget", "seeds", "model", "mixtures", "pairs", "detectable_difference"),
        *("verdict", "verdict_kind", "best"),
    }
    assert list(results["mixtures"]) == ["learned", *PLAIN, "skewed", "same"]
    assert (results["seeds"], results["token_budget"]) == ([0, 1], BUDGET)
    for name, mixture in results["mixtures"].items():
        assert sum(mixture["weights"].values()) == pytest.approx(1, abs=1e-9)
        assert list(mixture["weights"]) == list(mixture["domain_losses"]) == list(NAMES)
        assert sum(mixture["tokens"].values()) == results["token_budget"]
        scores = np.stack([np.load(run_dir / "compare" / name / f"seed-{seed}" / "scores.npy") for seed in (0, 1)])
        ids = open_store(RunDirectory(run_dir)).domain_ids(training.held_out_ids(open_store(RunDirectory(run_dir))))
        for domain_id, domain in enumerate(NAMES):
            sums = scores[:, ids == domain_id].sum(axis=1)
            assert mixture["domain_losses"][domain] == pytest.approx((sums[:, 0] / sums[:, 1]).mean(), abs=1e-12)
        assert mixture["average_loss"] == pytest.approx(np.mean(list(mixture["domain_losses"].values())), abs=1e-12)
    learned = read_json(run_dir / "weights" / "domain_weights.json")["domain_weights"]
    assert results["mixtures"]["learned"]["weights"] == learned
    assert results["mixtures"]["skewed"]["weights"] == pytest.approx({"fruit": 0.1, "metal": 0.1, "水": 0.8})
    assert {pair["baseline"] for pair in results["pairs"] if pair["mixture"] == "learned"} == {*PLAIN, "skewed", "same"}
    assert results["verdict"].startswith("Over 2 seeds, learned ")
    assert results["verdict"].endswith(".")
    assert "\n" not in results["verdict"]
    assert results["best"] in results["mixtures"]
    notice, _, plan = printed.stderr.splitlines()[:3]
    assert "skewed.json: read as {domain: weight} in JSON" in notice
    assert plan == (
        f"  6 mixtures x 2 seeds, {results['token_budget']:,} tokens each: learned, natural, uniform, temperature, "
        "skewed, same"
    )


def test_the_same_weights_have_the_same_losses_to_the_bit(compared, results):
    """Nothing but the weights makes a difference, and our own format can be entered."""
    learned, same = (results["mixtures"][name] for name in ("learned", "same"))
    assert {**same, "name": "learned"} == learned
    for seed in (0, 1):
        one, two = (compared[0] / "compare" / name / f"seed-{seed}" / "scores.npy" for name in ("learned", "same"))
        assert one.read_bytes() == two.read_bytes()


def test_all_mixtures_of_a_seed_start_alike_and_take_as_many_steps(compared, results):
    run_dir, watch, _ = compared
    assert set(watch.schedules) == {f"{name}/seed-{seed}" for name in results["mixtures"] for seed in (0, 1)}
    for seed in (0, 1):
        assert len({watch.starts[part] for part in watch.starts if part.endswith(f"seed-{seed}")}) == 1
    assert len(set(watch.starts.values())) == 2
    (num_steps,) = {len(schedule.counts_SK) for schedule in watch.schedules.values()}
    alike = [section.model_copy(update={"seed": 0}) for section in watch.sections.values()]
    assert all(section == alike[0] for section in alike)
    assert {part: section.seed for part, section in watch.sections.items()} == {
        part: int(part[-1]) for part in watch.schedules
    }
    for part, schedule in watch.schedules.items():
        assert len(read_log(run_dir / "compare" / part / "metrics.jsonl")) == num_steps
        sizes = schedule.counts_SK.sum(axis=1)
        assert sizes.max() - sizes.min() <= 1


def test_every_mixture_draws_its_tokens_and_no_domain_more_than_its_epochs(compared, results):
    run_dir, watch, _ = compared
    store = open_store(RunDirectory(run_dir))
    lengths = store.sequence_lengths()
    for part, schedule in watch.schedules.items():
        allocated = results["mixtures"][part.partition("/")[0]]["tokens"]
        drawn = np.concatenate([schedule.batch(step) for step in range(len(schedule.counts_SK))])
        assert abs(lengths[drawn].sum() - results["token_budget"]) < 0.05 * results["token_budget"]
        for domain_id, name in enumerate(NAMES):
            mine = drawn[store.domain_ids(drawn) == domain_id]
            available = schedule.sequence_ids_by_domain[domain_id]
            # As the allocation has it, up to half a sequence: then counted in sequences of the mean length.
            length = lengths[training.sequence_ids(store, "train")[domain_id]].mean()
            assert abs(len(mine) * length - allocated[name]) <= length / 2 + 1
            times = np.bincount(mine, minlength=len(lengths))[available]
            assert times.max() - times.min() <= 1
            assert times.max() <= 4
    # The cap is felt: 80 % were asked for.
    skewed = results["mixtures"]["skewed"]
    assert skewed["capped_domains"] == ["水"]
    assert skewed["tokens"]["水"] == 4 * store.summaries[2]["train"]["tokens"]
    assert skewed["tokens"]["fruit"] == pytest.approx(skewed["tokens"]["metal"], abs=1)
    assert [name for name, mixture in results["mixtures"].items() if mixture["capped_domains"]] == ["skewed"]


def test_a_budget_smaller_than_the_mixtures_cuts_domains_in_proportion(compared):
    """What is repeated so and so often in the mixture is repeated as often in the comparison."""
    run_dir, _, _ = compared
    run = RunDirectory(run_dir)
    store = open_store(run)
    given = run.describe()["given"]
    given = {**given, "mixture": {"token_budget": 12_000}, "compare": {"token_budget": 3_000}}
    config, _ = resolve(given, run)
    whole = training.sequence_ids(store, "train")
    chosen, available = compare._available(config, store, 3_000, seed=0)
    other, _ = compare._available(config, store, 3_000, seed=1)
    assert [len(ids) for ids in chosen] == [round(len(ids) / 4) for ids in whole]
    for ids, everything, others, summary in zip(chosen, whole, other, store.summaries, strict=True):
        assert set(ids) <= set(everything)
        assert set(ids) != set(others)
        assert available[summary["name"]] == round(summary["train"]["tokens"] * len(ids) / len(everything))
    # A mixture as large as the comparison is not cut.
    given = {**given, "mixture": {"token_budget": 3_000}}
    assert [len(ids) for ids in compare._available(resolve(given, run)[0], store, 3_000, 0)[0]] == list(map(len, whole))


# --- The verdict.


def test_the_verdict_travels_with_the_weights(compared, results):
    data = read_json(compared[0] / "weights" / "domain_weights.json")
    expected = {
        "kind": results["verdict_kind"],
        "sentence": results["verdict"],
        "best": results["best"],
        "num_seeds": 2,
    }
    assert data["verdict"] == expected
    weights = DomainWeights.from_dict(data)
    assert weights.verdict == expected
    assert weights.to_dict() == data
    # Everything else is as it was, and the stage has not become another.
    states = json.loads(invoke("status", "--run-dir", compared[0], "--json").stdout)
    assert (states["weights"], states["compare"], states["mixture"]) == ("finished", "finished", "finished")


def test_weights_that_are_made_again_have_no_verdict(compared, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(compared[0], run_dir)
    assert invoke("weights", "--run-dir", run_dir, "--set", "weights.shrink=0.5").exit_code == 0
    assert read_json(run_dir / "weights" / "domain_weights.json")["verdict"] == {}
    states = json.loads(invoke("status", "--run-dir", run_dir, "--json").stdout)
    assert (states["weights"], states["compare"]) == ("finished", "outdated")


def test_the_same_weights_made_again_get_their_verdict_back(compared, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(compared[0], run_dir)
    (run_dir / "weights" / "manifest.json").unlink()
    assert invoke("weights", "--run-dir", run_dir).exit_code == 0
    assert read_json(run_dir / "weights" / "domain_weights.json")["verdict"] == {}
    assert invoke("compare", "--run-dir", run_dir).stderr.splitlines() == ["compare: up to date"]
    name = "weights/domain_weights.json"
    assert (run_dir / name).read_bytes() == (compared[0] / name).read_bytes()


def test_the_table_fits_80_columns(compared, results):
    run_dir, _, first = compared
    result = invoke("compare", "--run-dir", run_dir)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines() == ["compare: up to date"]
    assert result.stdout == first.stdout
    lines = result.stdout.splitlines()
    smallest = max(results["detectable_difference"].values())
    assert lines[-3:] == [
        f"verdict: {results['verdict']}",
        f"power: 2 seeds find a true difference of {smallest:.4f} nats per token four times in five (noise of the "
        "seeds alone); --seeds N for more",
        f"results: {run_dir}/compare/results.json  picture: {run_dir}/compare/comparison.png",
    ]
    assert max(map(len, lines[:-3])) <= 80
    rows = [line.split()[0] for line in lines[:-3] if line.split() and line.split()[0] in results["mixtures"]]
    by_loss = sorted(results["mixtures"], key=lambda name: (results["mixtures"][name]["average_loss"], name))
    # All by loss, then the title of the second table and the others against the learned one.
    assert rows == [*by_loss, "learned", *(name for name in by_loss if name != "learned")]


def test_as_json(compared, results):
    result = invoke("compare", "--run-dir", compared[0], "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == results


def test_learn_can_compare_at_once(corpus, small_settings, tmp_path):
    sets = [f"--set={name}.{key}={value}" for name, section in small_settings.items() for key, value in section.items()]
    sets += ["--set=compare.num_seeds=1", "--set=compare.token_budget=900"]
    result = invoke("learn", corpus, "--run-dir", tmp_path / "run", "--token-budget", 900, "--compare", "--json", *sets)
    assert result.exit_code == 0, result.stderr
    verdict = json.loads(result.stdout)["verdict"]
    assert verdict["kind"] == "one_seed"
    # Drawn after the comparison.
    assert f"  verdict: {verdict['sentence']}" in result.stderr.splitlines()


# --- Refusals.


def test_also_needs_a_name_and_a_file(finished_run):
    for entry in ("weights.json", "=weights.json", "mine="):
        assert_one_line(
            invoke("compare", "--run-dir", finished_run, "--also", entry),
            f"--also {entry}: expected NAME=WEIGHTS_JSON, for example --also mine=weights.json",
        )


@pytest.mark.parametrize("name", ["learned", "natural", "uniform", "temperature", "best", "a/b", ".a"])
def test_names_that_are_taken(finished_run, entered, name):
    assert_one_line(
        invoke("compare", "--run-dir", finished_run, "--also", f"{name}={entered / 'skewed.json'}"),
        f"compare.also: {name!r} cannot be the name of a mixture; choose another",
    )


GIVE = "give a domain_weights.json, or {domain: weight}"
EACH = "give one weight to each of ['fruit', 'metal', '水']"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory); give a domain_weights.json"),
        ("{half", f"is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); {GIVE}"),
        (b"\xff\xfe", "is not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); " + GIVE),
        ([1, 2], f"domain weights must be an object, got a list; {GIVE}"),
        ({"fruit": 0.5, "metal": 0.5}, f"'水' has no weight; {EACH}"),
        ({"fruit": 1, "metal": 1, "水": 1, "gold": 1}, f"'gold' is no domain of this run; {EACH}"),
        ({"fruit": 1, "metal": "1", "水": 1}, f"the weight of 'metal' must be a number, got '1'; {GIVE}"),
        ({"fruit": 1, "metal": True, "水": 1}, f"the weight of 'metal' must be a number, got True; {GIVE}"),
        ({"fruit": 1, "metal": -1, "水": 1}, f"the weight of 'metal' must be finite and at least 0, got -1; {GIVE}"),
        ('{"fruit": NaN, "metal": 1}', f"the weight of 'fruit' must be finite and at least 0, got nan; {GIVE}"),
        ({"fruit": 0, "metal": 0, "水": 0}, f"no weight is above 0; {GIVE}"),
        ({}, f"no weight is above 0; {GIVE}"),
        (
            {"format": "theirs", "domain_weights": {}},
            f'"format" must be "doremi-mix/domain-weights", got \'theirs\'; {GIVE}',
        ),
    ],
)
def test_files_that_hold_no_weights_for_these_domains(compared, tmp_path, content, problem):
    path = tmp_path / "w.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    before = (compared[0] / "run.json").read_bytes()
    assert_one_line(invoke("compare", "--run-dir", compared[0], "--also", f"mine={path}"), f"{path}: {problem}")
    # Neither the earlier comparison nor the settings of the run are lost.
    assert (compared[0] / "run.json").read_bytes() == before
    assert (compared[0] / "compare" / "results.json").exists()


def test_a_mixture_that_cannot_fill_the_budget_is_named_before_anything_is_trained(finished_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"fruit": 0, "metal": 0, "水": 1}), encoding="utf-8")
    result = invoke("compare", "--run-dir", run_dir, "--also", f"mine={path}", f"--set=compare.token_budget={BUDGET}")
    available = open_store(RunDirectory(run_dir)).summaries[2]["train"]["tokens"]
    needed = math.ceil(BUDGET / available * 100) / 100
    assert_one_line(
        result,
        f"compare: mixture 'mine': token budget 10,000 is impossible: {available:,} tokens in domains with a weight "
        f"above 0, each drawn at most 4 times, give at most {4 * available:,}; lower the token budget to "
        f"{4 * available:,} or raise mixture.max_epochs to {needed:.2f}",
    )
    assert not list((run_dir / "compare").glob("*/seed-*"))


def test_steps_are_not_for_the_user(finished_run):
    assert_one_line(
        invoke("compare", "--run-dir", finished_run, "--set", "compare.steps=5"),
        "compare.steps is 5, but the steps follow from compare.token_budget and compare.batch_size; give one of these "
        "instead",
    )


def test_before_there_are_weights(finished_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    (run_dir / "weights" / "manifest.json").unlink()
    assert_one_line(
        invoke("compare", "--run-dir", run_dir),
        f"weights has not finished in {run_dir}; run: doremi-mix weights --run-dir {run_dir}",
    )


# --- Killed and started again.


@pytest.mark.parametrize(
    ("target", "count", "finished", "begun"),
    [
        # In the middle of the third model's steps.
        ("doremi_mix.train:_flush", "2.5 models", 2, "uniform/seed-0"),
        # Between the end of a model's training and the note that it is scored; then in the second seed.
        ("doremi_mix.stages.compare:_save_array", 2, 1, "natural/seed-0"),
        # Everything is trained, nothing is written.
        ("doremi_mix.stages.compare:restore_verdict", 1, 12, ""),
    ],
)
def test_killed_and_started_again(finished_run, entered, compared, tmp_path, target, count, finished, begun):
    undisturbed, watch, _ = compared
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    num_steps = len(next(iter(watch.schedules.values())).counts_SK)
    count = 2 * num_steps + num_steps // 2 if count == "2.5 models" else count
    arguments = ["compare", "--run-dir", str(run_dir), *options(entered), "--set=compare.checkpoint_every=3"]

    def start(*when):
        command = [sys.executable, str(KILL_AT), *when, "--", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    killed = start("SIGKILL", target, str(count))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = {path: path.stat().st_mtime_ns for path in (run_dir / "compare").glob("*/*/scores.npy")}
    assert len(done) == finished
    assert not (run_dir / "compare" / "manifest.json").exists()
    assert read_json(run_dir / "weights" / "domain_weights.json")["verdict"] == {}
    log = run_dir / "compare" / begun / "metrics.jsonl"
    kept = log.read_bytes().splitlines()[:3] if "_flush" in target else []
    again = start("SIGKILL", "doremi_mix.train:_flush", "1000000")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == done
    # The steps before the checkpoint are not made again: their seconds stay.
    assert not kept or log.read_bytes().splitlines()[:3] == kept
    for name in ("compare/results.json", "compare/comparison.png", "weights/domain_weights.json"):
        assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not list((run_dir / "compare").rglob("checkpoint.pt"))
    assert not list((run_dir / "compare").rglob("*.tmp"))
