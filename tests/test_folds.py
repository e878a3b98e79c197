"""Cross-fitting: no sequence is scored by a reference that trained on it."""

import json
import math
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import WORDS, read_log
from hypothesis import given
from hypothesis import strategies as st
from test_resume import KILL_AT, NEVER, PATCHES

from doremi_mix import learn, plan
from doremi_mix.batches import Schedule
from doremi_mix.errors import ConfigError
from doremi_mix.folds import Folds, choose_folds, fold_ids, fold_names
from doremi_mix.models import TokenInfo, load_trained
from doremi_mix.objectives import PlainObjective
from doremi_mix.pipeline import describe_plan, resolve
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages import StageContext, reference, reference_losses, stage_named, training
from doremi_mix.stages.reference_losses import ReferenceLosses

NAMES = ("fruit", "metal", "水")


def split_ids(sizes):
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


# --- The split.


@given(
    num_folds=st.integers(1, 7), more=st.integers(0, 50), seed=st.integers(0, 2**32 - 1), domain_id=st.integers(0, 30)
)
def test_folds_are_balanced_and_a_pure_function(num_folds, more, seed, domain_id):
    folds = fold_ids(num_folds + more, num_folds, seed, domain_id)
    sizes = np.bincount(folds, minlength=num_folds)
    assert sizes.sum() == num_folds + more
    assert sizes.max() - sizes.min() <= 1
    assert (fold_ids(num_folds + more, num_folds, seed, domain_id) == folds).all()


def test_folds_differ_by_seed_and_domain_and_are_no_blocks():
    folds = fold_ids(100, 2, 0, 0)
    assert (folds != fold_ids(100, 2, 1, 0)).any()
    assert (folds != fold_ids(100, 2, 0, 1)).any()
    assert 30 < np.count_nonzero(np.diff(folds)) < 70
    with pytest.raises(ValueError, match="2 sequences cannot be split into 3 folds"):
        fold_ids(2, 3, 0, 0)


@pytest.mark.parametrize("num_folds", [2, 3, 5])
def test_no_reference_trains_on_what_it_scores(num_folds):
    """Sizes from five sequences to a thousand, and so many steps that everything allowed is drawn."""
    by_domain = split_ids([5, 1000, 17, 64])
    everything = np.concatenate(by_domain)
    folds = Folds(by_domain, num_folds, seed=3)
    scored = folds.of(everything)
    for fold in range(num_folds):
        schedule = Schedule(folds.training_ids(fold), np.array([0.25] * 4), 8, 2500, seed=3)
        trained = np.unique(np.concatenate([schedule.batch(step) for step in range(2500)]))
        assert not np.intersect1d(trained, everything[scored == fold]).size
        assert (np.union1d(trained, everything[scored == fold]) == everything).all()
    assert not folds.unsplit


def test_a_domain_smaller_than_the_folds_is_trained_on_by_all():
    by_domain = split_ids([10, 2])
    folds = Folds(by_domain, 3, seed=0)
    assert folds.unsplit == (1,)
    for fold in range(3):
        assert folds.training_ids(fold)[1].tolist() == [10, 11]
    assert folds.of(np.array([11, 10])).tolist() == [0, 0]


def test_one_fold_is_everything():
    by_domain = split_ids([3, 1])
    folds = Folds(by_domain, 1, seed=0)
    assert [ids.tolist() for ids in folds.training_ids(0)] == [[0, 1, 2], [3]]
    assert folds.of(np.arange(4)).tolist() == [0, 0, 0, 0]
    assert folds.unsplit == ()
    assert fold_names(1) == ("",)
    assert fold_names(2) == ("fold-1", "fold-2")


# --- How many.


def test_folds_are_chosen_where_a_reference_would_repeat_itself():
    sizes = {"a": 90, "b": 20}
    assert choose_folds(None, {"a": 0.9, "b": 1.0}, sizes) == (1, "the reference passes over no domain more than once")
    assert choose_folds(None, {"a": 0.9, "b": 1.05}, sizes) == (2, "one reference would pass 1.05 times over b")
    assert choose_folds(1, {"a": 0.9, "b": 9.0}, sizes) == (1, "reference.folds is 1")
    assert choose_folds(4, {"a": 0.9, "b": 0.5}, sizes) == (4, "reference.folds is 4")
    assert choose_folds(None, {"a": 9.0, "b": 9.0}, {"a": 1, "b": 1}) == (1, "no domain has two sequences")


def test_the_plan_counts_the_references(corpus, model_config, monkeypatch):
    monkeypatch.setattr(plan, "_measure_step", lambda *_args: plan._Step(2.0, 1.0, 1, 1000))
    sources = [{"path": str(path)} for path in sorted(corpus.iterdir())]

    def cost(folds):
        reference = {"model": str(model_config), "steps": 12, "batch_size": 6, "folds": folds}
        given = {"sources": sources, "tokenize": {"vocab_size": 400, "context_length": 64}, "reference": reference}
        given["proxy"] = {"method": "doremi"}
        config, hardware = resolve(given, RunDirectory(corpus / "none"))
        return plan.estimate(config, TokenInfo(400, 1, 0)), describe_plan(config, hardware)

    one, lines_of_one = cost(1)
    three, lines_of_three = cost(3)
    assert three.tokens == {**one.tokens, "reference": 3 * one.tokens["reference"]}
    assert three.seconds == {**one.seconds, "reference": 3 * 12 * 2.0}
    assert "  reference 12 steps of 6 sequences, then proxy 12 steps of 6" in lines_of_one
    assert "  reference 12 steps of 6 sequences (3 times), then proxy 12 steps of 6" in lines_of_three
    assert "(twice, if it passes over a domain more than once)" in cost(None)[1][2]


# --- The stages.


def with_reference(settings, **more):
    return {**settings, "reference": {**settings["reference"], **more}}


class Watch:
    """Records what each reference is trained on, and what each is asked to score."""

    def __init__(self, monkeypatch):
        self.trained, self.scored, self._part = {}, {}, ""
        real_train, real_model, real_load = training.train, reference_losses.trained_model, reference_losses.load_batch

        def train(model, objective, schedule, read, plan, folder, *rest):
            def watched(ids):
                self.trained.setdefault(folder.name, set()).update(ids.tolist())
                return read(ids)

            return real_train(model, objective, schedule, watched, plan, folder, *rest)

        def trained_model(run, section, part=""):
            self._part = part or "reference"
            return real_model(run, section, part)

        def load_batch(store, ids):
            self.scored.setdefault(self._part, set()).update(ids.tolist())
            return real_load(store, ids)

        monkeypatch.setattr(training, "train", train)
        monkeypatch.setattr(reference_losses, "trained_model", trained_model)
        monkeypatch.setattr(reference_losses, "load_batch", load_batch)


def reference_loss_of(store, model, sequence_ids):
    """Losses by transformers' own logits, a document at a time: no packing, no mask, no kernel of ours."""
    batch = store.batch(sequence_ids)
    losses_BT = torch.zeros(batch.labels_BT.shape)
    for row, documents in enumerate(batch.document_ids_BT):
        for document in range(documents.max() + 1):
            where = torch.from_numpy(np.flatnonzero(documents == document))
            ids = torch.from_numpy(batch.input_ids_BT[row])[where]
            labels = torch.from_numpy(batch.labels_BT[row])[where]
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            losses_BT[row, where] = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses_BT.numpy()


def check_cross_fitted(run_dir, watch, num_folds):
    """Asserts that no reference trained on what it scored, and that together they scored what the proxy drew."""
    parts = fold_names(num_folds)
    assert set(watch.scored) == set(parts)
    for part in parts:
        assert watch.trained[part]
        assert watch.scored[part]
        assert not watch.trained[part] & watch.scored[part]
    drawn = np.load(run_dir / "reference_losses" / "sequence_ids.npy").tolist()
    assert set().union(*watch.scored.values()) == set(drawn)
    assert watch.trained["proxy"] == set(drawn)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """A folder of three domains of 150, 40 and 3 rows."""
    folder = tmp_path_factory.mktemp("skewed")
    rng = random.Random(0)
    for name, num_rows in zip(NAMES, (150, 40, 3), strict=True):
        rows = [
            {"instruction": f"List {n} of {name}.", "output": " ".join(rng.choices(WORDS[name], k=12))}
            for n in range(num_rows)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("num_folds", [2, 3])
def test_a_run_with_folds(corpus, small_settings, tmp_path, monkeypatch, capsys, num_folds):
    from transformers import AutoModelForCausalLM

    watch = Watch(monkeypatch)
    monkeypatch.setattr(reference_losses, "SCORE_TOKENS", 512)
    weights = learn(corpus, tmp_path / "run", **with_reference(small_settings, folds=num_folds))
    assert math.fsum(weights.domain_weights.values()) == pytest.approx(1)
    check_cross_fitted(tmp_path / "run", watch, num_folds)
    assert (
        f"  cross-fitting in {num_folds} folds: reference.folds is {num_folds}; {num_folds} references of 12 steps are "
        "trained instead of 1"
    ) in capsys.readouterr().err.splitlines()

    # Cached losses are those of the fold's saved model.
    store = training.open_store(RunDirectory(tmp_path / "run"))
    cached = ReferenceLosses(tmp_path / "run" / "reference_losses")
    own, other = [], []
    for part in fold_names(num_folds):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "reference" / part / "model")
        mine = np.array(sorted(watch.scored[part]))[:6]
        theirs = np.array(sorted(set(cached.sequence_ids) - watch.scored[part]))[:6]
        own.append(np.abs(reference_loss_of(store, model, mine) - cached.read(mine)).max())
        other.append(np.abs(reference_loss_of(store, model, theirs) - cached.read(theirs)).max())
    assert max(own) < 1e-4
    assert min(other) > 1e-2

    # The artifacts.
    folder = tmp_path / "run" / "reference"
    assert read_json(folder / "folds.json") == {
        "num_folds": num_folds,
        "reason": f"reference.folds is {num_folds}",
        "seed": 0,
        "not_cross_fitted": [],
    }
    assert not list(folder.rglob("checkpoint.pt"))
    assert not (folder / "model").exists()
    metrics = read_json(folder / "metrics.json")
    assert list(metrics["folds"]) == list(fold_names(num_folds))
    for part, of_fold in metrics["folds"].items():
        assert len(read_log(folder / part / "metrics.jsonl")) == 12
        assert of_fold["held_out_loss"] == read_json(folder / part / "metrics.json")["held_out_loss"]
    for name in NAMES:
        losses = [of_fold["held_out_loss"][name] for of_fold in metrics["folds"].values()]
        assert len({loss["loss"] for loss in losses}) == num_folds
        for key in ("loss", "standard_error"):
            expected = sum(loss[key] for loss in losses) / num_folds
            assert metrics["held_out_loss"][name][key] == pytest.approx(expected, abs=1e-12)
        assert metrics["held_out_loss"][name]["num_sequences"] == losses[0]["num_sequences"]
    expected = sum(loss["loss"] for loss in metrics["held_out_loss"].values()) / 3
    assert metrics["held_out_loss_average"] == pytest.approx(expected, abs=1e-12)

    # A model that is gone is noticed.
    stage = stage_named("reference")
    assert stage.manifest(RunDirectory(tmp_path / "run")) is not None
    (folder / "fold-2" / "model").rename(tmp_path / "gone")
    assert stage.manifest(RunDirectory(tmp_path / "run")) is None


def test_skewed_domains_and_one_that_cannot_be_split(skewed, small_settings, tmp_path, monkeypatch, capsys):
    watch = Watch(monkeypatch)
    learn(skewed, tmp_path / "run", **with_reference(small_settings, folds=4, weights="uniform", steps=20))
    store = training.open_store(RunDirectory(tmp_path / "run"))
    small = set(training.sequence_ids(store, "train")[2].tolist())
    assert 0 < len(small) < 4
    for part in fold_names(4):
        assert small <= watch.trained[part]
        assert not watch.trained[part] & (watch.scored[part] - small)
    assert small <= watch.scored["fold-1"]
    assert read_json(tmp_path / "run" / "reference" / "folds.json")["not_cross_fitted"] == ["水"]
    assert (
        f"  too few sequences for 4 folds: 水 ({len(small)}); every reference trains on all of them, so their losses "
        "are not cross-fitted"
    ) in capsys.readouterr().err.splitlines()


def test_more_folds_than_any_domain_has_sequences(skewed, small_settings, tmp_path):
    with pytest.raises(ConfigError) as caught:
        learn(skewed, tmp_path / "run", quiet=True, **with_reference(small_settings, folds=5000))
    most = training.open_store(RunDirectory(tmp_path / "run")).num_sequences(0)
    assert str(caught.value) == (
        f"reference.folds is 5000, more than the {most} training sequences of the largest domain, fruit; lower it to "
        f"{most} or less"
    )


def test_the_number_is_chosen_by_the_data(corpus, small_settings, tmp_path, monkeypatch, capsys):
    watch = Watch(monkeypatch)
    learn(corpus, tmp_path / "once", **small_settings)
    assert "\n  one reference scores all that the proxy draws, not cross-fitted: the reference passes over no " in (
        capsys.readouterr().err
    )
    assert read_json(tmp_path / "once" / "reference" / "folds.json")["num_folds"] == 1
    assert set(watch.trained) == {"reference", "proxy"}
    watch.trained.clear()
    watch.scored.clear()
    # Half of 72 draws from 28 sequences.
    weights = {"fruit": 1, "metal": 1, "水": 2}
    learn(corpus, tmp_path / "again", **with_reference(small_settings, weights=weights))
    assert (
        "  cross-fitting in 2 folds: one reference would pass 1.29 times over 水; 2 references of 12 steps are trained "
        "instead of 1"
    ) in capsys.readouterr().err.splitlines()
    check_cross_fitted(tmp_path / "again", watch, 2)


def test_one_fold_is_what_it_was(corpus, small_settings, tmp_path, monkeypatch):
    """The same bytes as plain training and plain scoring, transcribed from before there were folds."""
    learn(corpus, tmp_path / "run", quiet=True, **with_reference(small_settings, folds=1))
    run = RunDirectory(tmp_path / "run")
    config, _ = resolve(
        {
            **with_reference(small_settings, folds=1),
            "sources": [{"path": str(path)} for path in sorted(corpus.iterdir())],
        },
        run,
    )
    from doremi_mix.distributed import Processes
    from doremi_mix.progress import Narrator

    folder = tmp_path / "plain" / "reference"
    folder.mkdir(parents=True)
    context = StageContext(config, run, folder, Narrator(quiet=True), Processes())
    store = training.open_store(run)
    schedule = training.make_schedule(store, training.reference_weights(config, store), config.reference)
    model, losses = training.train_and_score(context, config.reference, PlainObjective(), schedule)
    training.write_metrics(context, losses, schedule, store.domains, model)
    for name in ("model/model.safetensors", "metrics.json"):
        assert (folder / name).read_bytes() == (tmp_path / "run" / "reference" / name).read_bytes()

    ids = training.proxy_schedule(config, store).drawn()
    assert np.load(tmp_path / "run" / "reference_losses" / "sequence_ids.npy").tolist() == ids.tolist()
    model, expected = load_trained(folder / "model"), []
    batch_size = training.SCORE_TOKENS // store.context_length
    for start in range(0, len(ids), batch_size):
        batch = training.load_batch(store, ids[start : start + batch_size])
        with torch.no_grad():
            expected.append(training.forward(model, batch).numpy())
    assert np.concatenate(expected).tobytes() == (tmp_path / "run" / "reference_losses" / "losses.f32").read_bytes()


def test_a_reference_that_knows_its_rows_by_heart(tmp_path, model_config):
    """The point of it all: on few rows of noise, the loss in the sample says that everything can be learned."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_config)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config.save_pretrained(tmp_path / "model")
    rng = random.Random(1)
    (tmp_path / "data").mkdir()
    for name in ("fruit", "metal"):
        rows = [{"instruction": str(n), "output": " ".join(rng.choices(WORDS[name], k=12))} for n in range(16)]
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(rows))
    settings = {
        "tokenize": {
            "vocab_size": 300,
            "context_length": 128,
            "held_out_fraction": 0.2,
            "preamble": "",
            "turn": "{query}:",
        },
        "reference": {"model": str(tmp_path / "model"), "steps": 60, "batch_size": 8, "learning_rate": 0.01},
        "proxy": {"steps": 2},
    }
    means = []
    for num_folds in (1, 2):
        run_dir = tmp_path / str(num_folds)
        learn(tmp_path / "data", run_dir, quiet=True, **with_reference(settings, folds=num_folds))
        losses = ReferenceLosses(run_dir / "reference_losses").losses_RT
        means.append(float(losses[losses > 0].mean()))
    held_out = read_json(tmp_path / "2" / "reference" / "metrics.json")["held_out_loss_average"]
    in_sample, cross_fitted = means
    assert in_sample < 0.2 * cross_fitted, (means, held_out)
    # What is cross-fitted is as far off as what was never drawn by any.
    assert cross_fitted == pytest.approx(held_out, rel=0.3), (means, held_out)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers in an old way
def test_adapters_over_one_base(corpus, finished_run, model_config, tmp_path, monkeypatch):
    """Each fold's adapter is the one that scores."""
    pytest.importorskip("peft")
    import transformers

    base = tmp_path / "base"
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(model_config)
    config.vocab_size = 400
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    (base / "tokenizer.json").write_bytes((finished_run / "tokenize" / "bpe" / "tokenizer.json").read_bytes())
    settings = {
        "tokenize": {"tokenizer": str(base / "tokenizer.json"), "context_length": 64},
        "reference": {
            "model": str(base),
            "lora_rank": 4,
            "steps": 12,
            "batch_size": 6,
            "learning_rate": 0.03,
            "folds": 2,
        },
    }
    watch = Watch(monkeypatch)
    learn(corpus, tmp_path / "run", quiet=True, **settings)
    check_cross_fitted(tmp_path / "run", watch, 2)
    store = training.open_store(RunDirectory(tmp_path / "run"))
    cached = ReferenceLosses(tmp_path / "run" / "reference_losses")
    from peft import PeftModel

    for part, other in (("fold-1", "fold-2"), ("fold-2", "fold-1")):
        folder = tmp_path / "run" / "reference" / part / "model"
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "doremi_mix_adapter.json",
        ]
        model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), str(folder))
        mine, theirs = (np.array(sorted(watch.scored[name]))[:6] for name in (part, other))
        assert np.abs(reference_loss_of(store, model, mine) - cached.read(mine)).max() < 1e-4
        assert np.abs(reference_loss_of(store, model, theirs) - cached.read(theirs)).max() > 1e-3


def test_trackers_get_a_run_for_each_fold(corpus, small_settings, tmp_path):
    pytest.importorskip("tensorboard")
    settings = with_reference(small_settings, folds=2)
    learn(corpus, tmp_path / "run", quiet=True, **settings, tracking={"trackers": ["tensorboard"]})
    logged = sorted(path.name for path in (tmp_path / "run" / "tracking" / "tensorboard").iterdir())
    assert logged == ["proxy", "reference-fold-1", "reference-fold-2"]


def test_metrics_without_held_out_sequences():
    one = {"num_parameters": 1, "held_out_loss_average": None, "held_out_loss": {}, "epochs": {"a": 1.0}}
    assert reference.average_metrics({"fold-1": one, "fold-2": {**one, "epochs": {"a": 2.0}}}) == {
        **one,
        "epochs": {"a": 1.5},
        "folds": {
            "fold-1": {"held_out_loss_average": None, "held_out_loss": {}, "epochs": {"a": 1.0}},
            "fold-2": {"held_out_loss_average": None, "held_out_loss": {}, "epochs": {"a": 2.0}},
        },
    }


# --- Kill and resume, and several processes.


@pytest.fixture(scope="module")
def arguments(corpus, small_settings):
    settings = with_reference(small_settings, folds=2, checkpoint_every=5)
    sets = [
        text
        for section, values in settings.items()
        for key, value in values.items()
        for text in ("--set", f"{section}.{key}={value}")
    ]
    return ["learn", str(corpus), *sets]


def start(arguments, run_dir, when=NEVER):
    command = [sys.executable, str(KILL_AT), *when, *PATCHES, "--", *arguments, "--run-dir", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = start(arguments, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


RESULTS = (
    "reference/fold-1/model/model.safetensors",
    "reference/fold-1/metrics.json",
    "reference/fold-2/model/model.safetensors",
    "reference/fold-2/metrics.json",
    "reference/metrics.json",
    "reference/folds.json",
    "reference_losses/losses.f32",
    "proxy/trajectory.jsonl",
    "weights/domain_weights.json",
)


@pytest.mark.parametrize(
    ("target", "count"),
    [
        # Three checkpoints a fold.
        ("doremi_mix.checkpoints:save_checkpoint", 3 + 2),
        # Between the end of the first fold's training and the note that it is done.
        ("doremi_mix.stages.reference:write_metrics", 1),
        # About five batches a fold.
        ("doremi_mix.stages.reference_losses:load_batch", 8),
    ],
)
def test_killed_in_a_fold_and_started_again(arguments, undisturbed, tmp_path, target, count):
    run_dir = tmp_path / "run"
    killed = start(arguments, run_dir, ("SIGKILL", target, str(count)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    logs = [run_dir / "reference" / part / "metrics.jsonl" for part in ("fold-1", "fold-2")]
    kept = [log.read_bytes().splitlines() if log.exists() else [] for log in logs]
    if "save_checkpoint" in target:
        assert (run_dir / "reference" / "fold-1" / "metrics.json").exists()
        assert not (run_dir / "reference" / "fold-1" / "checkpoint.pt").exists()
        assert (run_dir / "reference" / "fold-2" / "checkpoint.pt").exists()
        kept[1] = kept[1][:5]  # goes on from there
    again = start(arguments, run_dir)
    assert again.returncode == 0, again.stderr
    for log, lines in zip(logs, kept, strict=True):
        # Seconds and all: what was trained is not trained again.
        assert log.read_bytes().splitlines()[: len(lines)] == lines
    for name in RESULTS:
        assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not list(run_dir.rglob("*.tmp"))
    assert not list(run_dir.rglob("checkpoint.pt"))


def test_two_processes(arguments, undisturbed, tmp_path):
    from test_distributed import finish, free_port
    from test_distributed import start as launch

    rest = ["-m", "doremi_mix", *arguments, "--run-dir", str(tmp_path / "run")]
    finish(launch(["--nproc-per-node", "2", "--master-port", free_port()], rest))
    assert read_json(tmp_path / "run" / "reference" / "metrics.json")["num_processes"] == 2
    one, two = (ReferenceLosses(run_dir / "reference_losses") for run_dir in (undisturbed, tmp_path / "run"))
    assert one.sequence_ids.tolist() == two.sequence_ids.tolist()
    assert np.abs(one.losses_RT - two.losses_RT).max() < 1e-4
    assert ((one.losses_RT > 0) == (two.losses_RT > 0)).all()
