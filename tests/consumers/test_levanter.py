"""Marin's Levanter reads and draws what we export for it; see checking.py."""

import pytest

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ExportError

from .checking import RefusedError, write_problem

CONSUMER = "levanter"
pytestmark = pytest.mark.consumers

HOSTILE = [
    "two words",
    "a.b",
    "a:b",
    "中文",
    "yes",
    "1e5",
    "-dash",
    "null",
    "a,b",
    "it's",
    'say "x"',
    "x=y",
    "2024-01-01",
]
HOSTILE += ["org/name", "#no", "!tag", "$HOME", "a@b", "<<", "~", " lead", "new\nline", "0x1F"]


@pytest.mark.proves("marin", how="drawn")
def test_marin_draws_the_exported_shares_in_each_block(consumer, problem):
    export, (file,) = consumer.export("marin", problem.weights)
    read = consumer.ask("read", file=file)
    assert read["weights"] == export.expected
    assert read["urls"] == {name: [path] for name, path in problem.paths.items()}
    assert read["packs"] == {"alpha": True, "beta": True, "gamma": True}
    assert read["block"] == 2048
    drawn = consumer.ask("draw", file=file, number=3 * 2048)
    assert drawn == {name: 3 * 2048 * share for name, share in export.expected.items()}
    assert export.expected == pytest.approx({"alpha": 0.2, "beta": 0.5, "gamma": 0.3}, abs=1 / 2048)


@pytest.mark.proves("marin", how="drawn")
def test_hostile_names_are_read_as_they_are(consumer, tmp_path):
    shares = {name: (number + 1) / 276 for number, name in enumerate(HOSTILE)}
    folders = {name.rpartition("/")[0] for name in HOSTILE}
    for folder in folders:
        (tmp_path / "hostile" / folder).mkdir(parents=True, exist_ok=True)
    problem = write_problem(
        tmp_path / "hostile",
        {name: share / sum(shares.values()) for name, share in shares.items()},
        dict.fromkeys(HOSTILE, 3),
        dict.fromkeys(HOSTILE, 4),
    )
    export, (file,) = consumer.export("marin", problem.weights)
    read = consumer.ask("read", file=file)
    assert read["weights"] == export.expected
    assert read["urls"] == {name: [path] for name, path in problem.paths.items()}
    drawn = consumer.ask("draw", file=file, number=read["block"])
    assert drawn == {name: read["block"] * share for name, share in export.expected.items()}


def test_trap_a_weight_below_a_block_s_resolution_draws_nothing(consumer, tmp_path):
    weights = {"large": 0.9999, "small": 0.0001}
    naive = consumer.ask("draw_naive", weights=weights, block=2048, number=4 * 2048)
    assert naive["drawn"] == {"large": 4 * 2048}
    assert any("Recommend increasing block size" in warning for warning in naive["warnings"])

    problem = write_problem(tmp_path / "small", weights, {"large": 50, "small": 5}, {"large": 4, "small": 4})
    export, (file,) = consumer.export("marin", problem.weights)
    assert consumer.ask("read", file=file)["block"] == 2**15
    drawn = consumer.ask("draw", file=file, number=2**15)
    assert drawn == {"large": 2**15 - 3, "small": 3} == {name: 2**15 * s for name, s in export.expected.items()}


def test_trap_a_block_of_2_to_the_16_is_refused_by_levanter_and_a_smaller_weight_by_us(consumer):
    with pytest.raises(RefusedError, match=r"Block size must be at most 2\^16, got 65536"):
        consumer.ask("draw_naive", weights={"large": 0.99999, "small": 0.00001}, block=2**16, number=1)
    with pytest.raises(ExportError, match="less than one sequence in the largest block"):
        consumer.export("marin", DomainWeights({"large": 0.99999, "small": 0.00001}, {"large": 0.5, "small": 0.5}))


def test_trap_what_rounding_leaves_goes_to_one_domain(consumer):
    names = [f"domain {number}" for number in range(150)]
    naive = consumer.ask("draw_naive", weights=dict.fromkeys(names, 1 / 150), block=2048, number=2048)["drawn"]
    assert naive["domain 0"] == 111
    assert {naive[name] for name in names[1:]} == {13}

    weights = DomainWeights(dict.fromkeys(names, 1 / 150), dict.fromkeys(names, 1 / 150))
    export, (file,) = consumer.export("marin", weights)
    read = consumer.ask("read", file=file)
    counts = consumer.ask("draw_naive", weights=read["weights"], block=read["block"], number=read["block"])["drawn"]
    assert counts == {name: read["block"] * share for name, share in export.expected.items()}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_trap_the_key_of_the_other_levanter_is_refused(consumer, problem):
    _, (file,) = consumer.export("levanter", problem.weights)
    with pytest.raises(RefusedError, match="configs"):
        consumer.ask("read", file=file)
