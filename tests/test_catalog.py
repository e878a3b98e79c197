from collections import Counter

import pytest

from doremi_mix.errors import ConfigError, SourceNotFoundError
from doremi_mix.sources import Source
from doremi_mix.sources.catalog import CATALOGS, resolve

ENTRIES = CATALOGS["bettermixture"]


def make(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("[]", encoding="utf-8")


def test_the_table_agrees_with_the_published_totals():
    assert Counter(entry.language for entry in ENTRIES) == {"en": 13, "zh": 7}
    assert sum(entry.num_rows for entry in ENTRIES) == 3_389_174
    assert len({entry.name for entry in ENTRIES}) == len({entry.path for entry in ENTRIES}) == 20


def test_published_places(tmp_path):
    make(tmp_path, *(entry.path for entry in ENTRIES))
    sources = resolve("bettermixture", tmp_path)
    assert sources == [Source(entry.name, tmp_path / entry.path) for entry in ENTRIES]
    assert sources[4] == Source("COIG_translate_en", tmp_path / "COIG" / "translate_en.json")


def test_other_places(tmp_path):
    make(tmp_path, *(f"{entry.name}.jsonl.gz" for entry in ENTRIES[:7]))
    make(tmp_path, "finance_en.json", "GPT4all/gpt4all.json.zst", "gpt4all.json")
    make(tmp_path, *(f"{entry.name}.parquet" for entry in ENTRIES[9:]))
    assert (
        [source.path.relative_to(tmp_path).as_posix() for source in resolve("bettermixture", tmp_path)]
        == [
            *(f"{entry.name}.jsonl.gz" for entry in ENTRIES[:7]),
            "finance_en.json",
            "GPT4all/gpt4all.json.zst",  # where the collection keeps it comes before the folder itself
            *(f"{entry.name}.parquet" for entry in ENTRIES[9:]),
        ]
    )


def test_all_missing_files_are_named_at_once(tmp_path):
    make(tmp_path, *(entry.path for entry in ENTRIES if entry.name not in ("dolly", "HC3_Human")))
    with pytest.raises(SourceNotFoundError) as caught:
        resolve("bettermixture", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: 2 of the 20 files of bettermixture are missing: dolly/dolly.json, HC3/HC3_Human.json; copy"
        " them there"
        " (or as <name>.json, .jsonl or .parquet directly in the folder), or list your own sources"
    )


def test_no_such_root_or_catalog(tmp_path):
    with pytest.raises(SourceNotFoundError) as no_root:
        resolve("bettermixture", tmp_path / "no")
    assert str(no_root.value) == (
        f"{tmp_path}/no: there is no such folder, expected the root of bettermixture; set the data root"
    )
    with pytest.raises(ConfigError) as no_catalog:
        resolve("bettermixtur", tmp_path)
    assert str(no_catalog.value) == 'there is no catalog "bettermixtur"; did you mean bettermixture?'
