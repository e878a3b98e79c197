"""NeMo-Automodel samples by the corpus and weights the loss, as its export says."""

from pathlib import Path

import pytest

from doremi_mix.errors import ExportError
from doremi_mix.exporters.nemo import changed_by_automodel
from doremi_mix.exporters.plan import make_plan

from .checking import RefusedError, write_problem

CONSUMER = "nemo-automodel"
pytestmark = pytest.mark.consumers


@pytest.mark.proves("nemo-automodel", how="drawn")
@pytest.mark.parametrize("how", [{}, {"budget": 8000, "max_epochs": 2.0}], ids=["shares", "budget"])
def test_samples_the_corpus_and_weights_the_loss(consumer, problem, tmp_path, how):
    """With a budget, too: the epoch cap cuts gamma where rows are drawn, but not its part in the loss."""
    paths = {name: str(tmp_path / f"{name}_text_document") for name in problem.paths}
    assert make_plan(problem.weights, **how).capped == (("gamma",) if how else ())
    export, files = consumer.export("nemo-automodel", problem.weights, paths=paths, **how)
    documents = {paths["alpha"]: 500, paths["beta"]: 300, paths["gamma"]: 100}

    answer = consumer.ask("draw", path=files[0], write=documents, num_samples=4000)

    # Its schedule is that of Megatron: at most a sample off.
    expected = {name: share * 4000 for name, share in export.expected.items()}
    assert answer["drawn"] == pytest.approx(expected, abs=1.0)
    total = sum(answer["losses"].values())
    shares = {name: loss / total for name, loss in answer["losses"].items()}
    assert shares == pytest.approx(dict(problem.weights.domain_weights), abs=0.001)
    assert shares == pytest.approx(dict(export.second), abs=0.001)
    tokens = {name: statistics.available_tokens for name, statistics in problem.weights.corpus.items()}
    assert export.expected == pytest.approx({name: count / sum(tokens.values()) for name, count in tokens.items()})


def test_reads_weights_to_the_last_bit(consumer, tmp_path):
    names = ["a b", "a: #c", "中文", "q\"u'o", "-x", "a,b", "yes"]
    shares = dict(zip(names, (0.1, 0.2, 0.3, 0.1, 0.2, 0.1 - 1e-12, 1e-12), strict=True))
    problem = write_problem(tmp_path / "rows", shares, dict.fromkeys(names, 10), dict.fromkeys(names, 5))
    export, files = consumer.export("nemo-automodel", problem.weights)

    answer = consumer.ask("parse", path=files[0])

    assert answer["names"] == names
    assert answer["paths"] == list(problem.paths.values())
    assert answer["sampling"] == pytest.approx(list(export.expected.values()), rel=1e-12)
    assert answer["objective"] == pytest.approx(list(shares.values()), rel=1e-12)


def test_trap_names_that_are_python_literals(consumer, tmp_path):
    """Its loader evaluates strings, quoted or not: names that it changes are refused."""
    texts = [
        "1e5",
        "None",
        "true",
        "True ",
        "[1]",
        "'a'",
        "$HOME",
        "$a",
        "${HOME}",
        "b'x'",
        "set()",
        " 1",
        "1_0",
        "...",
    ]
    safe = ["yes", "a b", "-x", "1 2", "中文", "nan", "null", "007", "2024-01-01", "1if x", "'\\d"]
    answers = consumer.ask("translate", texts=texts + safe)
    changed = [text for text, same in zip(texts + safe, answers, strict=True) if not same]
    assert changed == [text for text in texts + safe if changed_by_automodel(text)] == texts
    problem = write_problem(tmp_path / "rows", {"1e5": 0.5, "b": 0.5}, {"1e5": 9, "b": 9}, {"1e5": 5, "b": 5})
    with pytest.raises(ExportError, match=r"^nemo-automodel: the name of domain '1e5' \('1e5'\) is empty, a Python"):
        consumer.export("nemo-automodel", problem.weights)


def test_trap_objective_weights_beside_other_sampling_weights(consumer, problem, tmp_path):
    """Sampling weights that are not those of dataset.paths are an error, not a silent change of the objective."""
    _, files = consumer.export("nemo-automodel", problem.weights)
    text = Path(files[0]).read_text(encoding="utf-8")
    naive = tmp_path / "naive.yaml"
    first = text.index("sampling_weight: ") + len("sampling_weight: ")
    naive.write_text(text[:first] + "0.2" + text[text.index("\n", first) :], encoding="utf-8")
    with pytest.raises(RefusedError, match="domain_mixture sampling weights must match the explicit weights"):
        consumer.ask("parse", path=str(naive))
    answer = consumer.ask("parse", path=files[0])
    assert answer["multipliers"] == pytest.approx(
        [w / q for w, q in zip(answer["objective"], answer["sampling"], strict=True)]
    )
