"""The package levanter reads and draws what we export for it; see checking.py."""

import pytest

from doremi_mix.domain_weights import DomainWeights

from .checking import RefusedError
from .test_levanter import HOSTILE

CONSUMER = "levanter-classic"
pytestmark = pytest.mark.consumers


@pytest.mark.proves("levanter", how="drawn")
def test_levanter_draws_the_exported_shares_in_each_block(consumer, problem):
    export, (file,) = consumer.export("levanter", problem.weights)
    read = consumer.ask("read", file=file)
    assert read["weights"] == export.expected
    assert read["urls"] == {name: [path] for name, path in problem.paths.items()}
    assert read["packs"] == {"alpha": True, "beta": True, "gamma": True}
    drawn = consumer.ask("draw", file=file, number=2 * 2048)
    assert drawn == {name: 2 * 2048 * share for name, share in export.expected.items()}


@pytest.mark.proves("levanter", how="parsed")
def test_hostile_names_are_read_as_they_are(consumer):
    equal = dict.fromkeys(HOSTILE, 1 / len(HOSTILE))
    export, (file,) = consumer.export("levanter", DomainWeights(equal, equal))
    read = consumer.ask("read", file=file)
    assert read["weights"] == export.expected
    assert read["urls"] == {name: [f"data/{name}.jsonl"] for name in HOSTILE}


def test_trap_the_key_of_marin_s_levanter_is_refused(consumer, problem):
    _, (file,) = consumer.export("marin", problem.weights)
    with pytest.raises(RefusedError, match="components"):
        consumer.ask("read", file=file)
