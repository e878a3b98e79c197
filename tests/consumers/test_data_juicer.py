"""Data-Juicer's dataset configuration."""

from pathlib import Path

import pytest
import yaml

from doremi_mix.errors import ExportError

from .checking import RefusedError, write_problem

CONSUMER = "data-juicer"
pytestmark = pytest.mark.consumers


def counts(export):
    return {name: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.proves("data-juicer", how="drawn")
def test_it_draws_exactly_the_counts(consumer, problem):
    export, [file] = consumer.export("data-juicer", problem.weights, budget=3000)
    assert consumer.ask("sample_numbers", file=file) == list(counts(export).values())
    assert consumer.ask("load", file=file) == {
        "drawn": counts(export),
        "most_often": {"alpha": 1, "beta": 1, "gamma": 1},
    }


@pytest.mark.proves("data-juicer", how="drawn")
def test_domains_are_repeated_up_to_the_epoch_cap_and_written(consumer, problem):
    export, [file] = consumer.export("data-juicer", problem.weights, budget=18_000)
    assert counts(export)["gamma"] == 200
    assert consumer.ask("load", file=file)["most_often"]["gamma"] == 4
    assert consumer.ask("process", file=file) == counts(export)


def test_hostile_names_are_read_right_or_refused(consumer, tmp_path):
    names = ["yes", "1e5", "-x", "a b", "it's", '"q"', "a,b:c#d@e", "中文", "\u2028 x", "null", "{x}", "a\\n", "%41"]
    problem = write_problem(
        tmp_path / "rows", dict.fromkeys(names, 1 / 13), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
    )
    export, [file] = consumer.export("data-juicer", problem.weights, budget=1200)
    assert consumer.ask("load", file=file)["drawn"] == counts(export)
    for name in ("a*", "q?", "[x]", "a::b"):
        problem = write_problem(tmp_path / "other", {name: 0.5, "b": 0.5}, {name: 9, "b": 9}, {name: 3, "b": 3})
        with pytest.raises(ExportError, match="takes for a pattern or a protocol"):
            consumer.export("data-juicer", problem.weights, budget=20)


def test_relative_paths_that_look_like_numbers(consumer, problem, tmp_path):
    # A folder named 1e5 in the folder that Data-Juicer runs in.
    for name, path in problem.paths.items():
        folder = consumer.folder / {"alpha": "1e5", "beta": "yes", "gamma": "0x1F"}[name]
        folder.mkdir()
        (folder / "rows.jsonl").write_text((tmp_path / "rows" / f"{name}.jsonl").read_text())
        assert path.endswith(f"{name}.jsonl")
    export, [file] = consumer.export(
        "data-juicer", problem.weights, budget=3000, paths={"alpha": "1e5", "beta": "yes", "gamma": "0x1F"}
    )
    assert consumer.ask("load", file=file)["drawn"] == counts(export)


def test_trap_weights_without_max_sample_num_have_no_effect(consumer, problem):
    _, [file] = consumer.export("data-juicer", problem.weights, budget=3000)
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    del config["dataset"]["max_sample_num"]
    naive = consumer.folder / "naive.yaml"
    naive.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert consumer.ask("load", file=str(naive))["drawn"] == problem.sizes
    with pytest.raises(ExportError, match="need a budget"):
        consumer.export("data-juicer", problem.weights)


def test_trap_rounding_up_takes_from_the_last_domain(consumer, problem, tmp_path):
    """Shares as they are: the first domains are rounded up, and the last one gets nothing at all."""
    names = ["a", "b", "c", "d", "e"]
    problem = write_problem(
        tmp_path / "five", dict.fromkeys(names, 0.2), dict.fromkeys(names, 50), dict.fromkeys(names, 5)
    )
    export, [file] = consumer.export("data-juicer", problem.weights, budget=11, budget_unit="examples")
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    for entry in config["dataset"]["configs"]:
        entry["weight"] = 0.2
    naive = consumer.folder / "naive.yaml"
    naive.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert consumer.ask("sample_numbers", file=str(naive)) == [3, 3, 3, 2, 0]
    assert consumer.ask("sample_numbers", file=file) == list(counts(export).values())
    assert sorted(counts(export).values()) == [2, 2, 2, 2, 3]


def test_trap_the_default_text_key_is_refused_by_it(consumer, problem):
    export, [file] = consumer.export("data-juicer", problem.weights, budget=3000)
    with pytest.raises(RefusedError, match=r"There is no key \[text\] in dataset"):
        consumer.ask("load", file=file, arguments=["--text_keys", "text"])
    assert any("text_keys" in note for note in export.notes)


def test_trap_a_path_with_a_dollar_reads_other_rows(consumer, problem, monkeypatch):
    """The datasets library, below Data-Juicer, puts in the variable, although the path is there as it stands."""
    for folder, name in (("$DOREMI_DATA", "alpha"), ("elsewhere", "gamma")):
        (consumer.folder / folder).mkdir()
        rows = Path(problem.paths[name]).read_text(encoding="utf-8")
        (consumer.folder / folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    monkeypatch.setenv("DOREMI_DATA", "elsewhere")
    path = str(consumer.folder / "$DOREMI_DATA" / "rows.jsonl")
    config = {"dataset": {"configs": [{"type": "local", "path": path}]}, "export_path": "x.jsonl", "process": []}
    naive = consumer.folder / "naive.yaml"
    naive.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert consumer.ask("load", file=str(naive))["drawn"] == {"gamma": 50}
    with pytest.raises(ExportError, match=r"has \$, which Data-Juicer's reader takes for an environment variable"):
        consumer.export("data-juicer", problem.weights, budget=3000, paths=problem.paths | {"alpha": path})


def test_trap_the_ray_executor_takes_one_dataset_and_no_sampling(consumer, problem):
    export, [file] = consumer.export("data-juicer", problem.weights, budget=3000)
    with pytest.raises(RefusedError, match="'RayDataset' object has no attribute 'num_rows'"):
        consumer.ask("load_with_ray", file=file)
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    del config["dataset"]["max_sample_num"]
    naive = consumer.folder / "naive.yaml"
    naive.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(RefusedError, match="Ray setup only supports one dataset now"):
        consumer.ask("load_with_ray", file=str(naive))
    assert export.notes[-1] == (
        "It needs the default executor: Data-Juicer's Ray executor takes one dataset only, and no max_sample_num."
    )
