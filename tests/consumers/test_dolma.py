"""Dolma's resharding reads and writes what we export for it; see checking.py."""

import pytest

CONSUMER = "dolma"
pytestmark = pytest.mark.consumers


def write_sources(consumer, tmp_path, problem, files_per_domain):
    """Writes the rows that are trained on as tokens, one a row, in files of one size; returns the paths to export."""
    arrays, paths = {}, {}
    for token, (name, rows) in enumerate(problem.kept.items(), start=1):
        paths[name] = str(tmp_path / "tok" / name)
        for number in range(files_per_domain):
            arrays[f"{paths[name]}/{number:03d}.npy"] = (token, len(rows) // files_per_domain)
    consumer.ask("write_tokens", arrays=arrays)
    return paths


@pytest.mark.proves("dolma", how="drawn")
def test_dolma_writes_the_planned_counts(consumer, problem, tmp_path):
    paths = write_sources(consumer, tmp_path, problem, 50)
    export, (file,) = consumer.export("dolma", problem.weights, budget=3000, paths=paths)
    read = consumer.ask("read", file=file)
    counts = {name: round(read[path] * len(problem.kept[name])) for name, path in paths.items()}
    drawn = consumer.ask("draw", file=file)
    # Whole files: of each domain, at most one file's rows more or less.
    for token, name in enumerate(paths, start=1):
        assert abs(drawn[str(token)] - counts[name]) <= len(problem.kept[name]) / 50, name
        assert counts[name] == pytest.approx(export.expected[name] * sum(counts.values()))


def test_trap_a_rate_of_a_source_in_one_file_takes_the_whole_file(consumer, problem, tmp_path):
    paths = write_sources(consumer, tmp_path, problem, 1)
    export, (file,) = consumer.export("dolma", problem.weights, budget=3000, paths=paths)
    assert consumer.ask("read", file=file)[paths["alpha"]] == pytest.approx(0.12, abs=0.01)
    assert consumer.ask("draw", file=file)["1"] == problem.sizes["alpha"]
    # The file alone cannot say it; the header does.
    assert any("takes at least one file" in note for note in export.notes)
