"""OpenRLHF's own parser reads our command, and its own code blends the files."""

import subprocess

import pytest

from doremi_mix.errors import ExportError

from .checking import RefusedError, assert_composition, write_problem

CONSUMER = "openrlhf"
pytestmark = pytest.mark.consumers


@pytest.mark.proves("openrlhf", how="drawn")
def test_under_a_budget_so_many_rows_are_kept(consumer, problem):
    export, [file] = consumer.export("openrlhf", problem.weights, budget=8000)
    answer = consumer.ask("train", file=file, command=export.usage)
    assert sum(answer["drawn"].values()) == export.num_drawn == 843
    assert_composition(answer["drawn"], export.expected)
    assert sum(map(float, answer["probabilities"].split(","))) == 1.0
    assert consumer.ask("options") == ["--data.prompt_dataset", "--data.prompt_probs", "--data.max_samples"]


@pytest.mark.proves("openrlhf", how="drawn")
def test_without_a_budget_it_draws_until_all_were_read(consumer, problem):
    export, [file] = consumer.export("openrlhf", problem.weights)
    answer = consumer.ask("train", file=file, command=export.usage)
    assert_composition(answer["drawn"], export.expected)
    assert all(answer["drawn"][name] >= size for name, size in problem.sizes.items())


def test_hostile_names_are_read_right_or_refused(consumer, tmp_path):
    names = [
        "yes",
        "1e5",
        "-x",
        "a b",
        "it's",
        '"q"',
        "中文",
        "[1]*?",
        "null",
        "{a}%s",
        "a\\n",
        "b\nc",
        "~",
        "1zz",
        "#c",
    ]
    names += ["`id`", "a;b", "a&b", "a:b", "!x"]
    problem = write_problem(
        tmp_path / "rows", dict.fromkeys(names, 1 / 20), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
    )
    export, [file] = consumer.export("openrlhf", problem.weights, budget=2400)
    answer = consumer.ask("train", file=file, command=export.usage)
    assert sum(answer["drawn"].values()) == export.num_drawn
    assert_composition(answer["drawn"], export.expected)


def test_trap_commas_at_signs_and_other_endings_in_paths(consumer, problem, tmp_path):
    for name in ("a,b.jsonl", "a@b.jsonl", "a.JSONL"):
        path = tmp_path / name
        path.write_text('{"domain": "beta"}\n', encoding="utf-8")
        with pytest.raises(RefusedError):
            consumer.ask("blend", paths=str(path), probabilities="1.0")
        with pytest.raises(ExportError, match=r"^openrlhf: domain 'beta': .*; give other paths: --paths$"):
            consumer.export("openrlhf", problem.weights, paths={**problem.paths, "beta": str(path)})


def test_trap_a_tiny_share_takes_it_forever(consumer, tmp_path):
    problem = write_problem(
        tmp_path / "rows", {"large": 1 - 1e-9, "tiny": 1e-9}, {"large": 100, "tiny": 50}, {"large": 5, "tiny": 5}
    )
    with pytest.raises(subprocess.TimeoutExpired):
        consumer.ask(
            "blend", timeout=8, paths=",".join(problem.paths.values()), probabilities="0.999999999,0.000000001"
        )
    with pytest.raises(ExportError, match=r"^openrlhf: domain 'tiny': OpenRLHF draws until every domain was read once"):
        consumer.export("openrlhf", problem.weights)
    # The budget reaches for none of its examples, and it is left out.
    export, [file] = consumer.export("openrlhf", problem.weights, budget=300)
    assert set(consumer.ask("train", file=file, command=export.usage)["drawn"]) == set(export.expected) == {"large"}


def test_trap_rounded_probabilities_do_not_sum_to_one(consumer, problem):
    with pytest.raises(RefusedError, match=r"[Pp]robabilities do not sum to 1"):
        consumer.ask("blend", paths=",".join(problem.paths.values()), probabilities="0.2,0.5,0.300001")
