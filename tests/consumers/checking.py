"""What checks by the real consumer share: its released code reads what we export, and where it can, draws from it.

A check consists of a driver (``drivers/NAME.py``, run by the consumer's own Python, which has not our package) and a
test that exports, asks the driver and compares.  Tier 1 runs in the normal suite, tier 2 by scripts/check_consumers.sh.
"""

import json
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.exporters import FORMATS, export_plan
from doremi_mix.exporters.plan import make_plan
from doremi_mix.types import DomainStatistics

from .environments import Environment

HERE = Path(__file__).parent


@dataclass
class Problem:
    """Domains with rows on disk, and weights for them.

    Each row is ``{"instruction", "input", "output", "messages", "domain"}``; ``domain`` says where it comes from.
    """

    weights: DomainWeights
    paths: dict
    rows: dict = field(repr=False)

    @property
    def sizes(self):
        """Rows of each file."""
        return {name: len(rows) for name, rows in self.rows.items()}

    @property
    def kept(self):
        """Rows of each file that are trained on: the first ones."""
        return {name: self.rows[name][: statistics.num_examples] for name, statistics in self.weights.corpus.items()}


def write_problem(folder, shares, num_rows, mean_words, seed=0, rejected=None):
    """Writes one JSONL file a domain, and returns weights whose corpus describes them; a word counts as a token.

    ``rejected``: by domain, how many rows the file has beside those that are trained on.
    """
    rng, other_rng = random.Random(seed), random.Random(seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    rows, corpus, paths = {}, {}, {}
    for name in shares:
        lengths = [max(1, mean_words[name] + rng.randint(-1, 1)) for _ in range(num_rows[name])]
        others = [max(1, mean_words[name] + other_rng.randint(-1, 1)) for _ in range((rejected or {}).get(name, 0))]
        rows[name] = [
            {
                "instruction": f"Say {number}.",
                "input": "",
                "output": " ".join(["word"] * length),
                "messages": [
                    {"role": "user", "content": f"Say {number}."},
                    {"role": "assistant", "content": " ".join(["word"] * length)},
                ],
                "domain": name,
            }
            for number, length in enumerate(lengths + others)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]), encoding="utf-8")
        paths[name] = str(path)
        corpus[name] = DomainStatistics(
            num_examples=num_rows[name],
            available_tokens=sum(lengths),
            num_sequences=max(1, sum(lengths) // 64),
            path=str(path),
            num_rows=len(rows[name]),
        )
    weights = DomainWeights(shares, dict.fromkeys(shares, 1 / len(shares)), corpus=corpus)
    return Problem(weights, paths, rows)


class RefusedError(Exception):
    """The driver failed: its traceback's end."""


@dataclass
class Consumer:
    """A program whose own code is asked."""

    environment: Environment
    folder: Path

    def export(self, format_name, weights, **how):
        """Writes an export into a new folder; returns the export and the paths of its files."""
        export = export_plan(FORMATS[format_name], make_plan(weights, **how))
        folder = self.folder / f"{format_name}-{len(list(self.folder.glob('*')))}"
        paths = []
        for file in export.files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.text, encoding="utf-8")
            paths.append(str(path))
        return export, paths

    def ask(self, task, timeout=300, **request):
        """Runs a task of the driver with the consumer's Python, and returns its answer.

        Raises:
            RefusedError: the driver raised; the message is the last lines of its traceback.
            subprocess.TimeoutExpired: it did not come back.
        """
        number = len(list(self.folder.glob("request-*.json")))
        question, answer = self.folder / f"request-{number}.json", self.folder / f"answer-{number}.json"
        question.write_text(json.dumps({"task": task, **request}, ensure_ascii=False), encoding="utf-8")
        driver = HERE / "drivers" / f"ask_{self.environment.name.replace('-', '_')}.py"
        done = subprocess.run(
            [str(self.environment.python), str(driver), str(question), str(answer)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd=self.folder,
        )
        if done.returncode:
            raise RefusedError(done.stderr[-2000:])
        return json.loads(answer.read_text(encoding="utf-8"))


def assert_composition(drawn, expected, least=1e-3):
    """Fails when counts differ from the expected shares by more than sampling error (chi-squared)."""
    from scipy.stats import chisquare

    assert set(drawn) <= set(expected), (drawn, expected)
    total = sum(drawn.values())
    observed = [drawn.get(name, 0) for name in expected]
    wanted = [share * total for share in expected.values()]
    found = chisquare(observed, wanted)
    assert found.pvalue > least, f"drawn {observed}, expected {wanted}, p = {found.pvalue}"
