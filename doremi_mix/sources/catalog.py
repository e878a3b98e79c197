"""The published collections that are known by name: their files, as a table.

The 20 sources of the BetterMixture challenge are files of the public Alpaca-CoT collection
(https://huggingface.co/datasets/QingyiSi/Alpaca-CoT). Each is one JSON array of instruction, input and output.
Revisions differ in their number of rows, so a run records the SHA-256 of every file that it reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from doremi_mix.errors import ConfigError, SourceNotFoundError
from doremi_mix.sources import Source
from doremi_mix.sources.files import COMPRESSED_SUFFIXES


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One source of a collection.

    Attributes:
        name: the name of its domain.
        language: ``en`` or ``zh``.
        path: where the collection keeps it, under its root.
        num_rows: its published number of rows.
        other_paths: where other revisions keep it.
        note: where the number of rows, or the other paths, come from.
    """

    name: str
    language: str
    path: str
    num_rows: int
    other_paths: tuple[str, ...] = ()
    note: str = ""


_BY_PUBLISHER = "the publisher's approximate count, not measured"
_BY_LOG = "counted in a log of the contest, not published with the collection"
_AT_ROOT = "older revisions have it at the root of the collection"

BETTERMIXTURE = (
    CatalogEntry("alpaca_data", "en", "alpaca/alpaca_data.json", 52_002),
    CatalogEntry("alpaca_gpt4_data", "en", "alpacaGPT4/alpaca_gpt4_data.json", 52_002),
    CatalogEntry("alpaca_gpt4_data_zh", "zh", "alpacaGPT4/alpaca_gpt4_data_zh.json", 48_818),
    CatalogEntry(
        "belle_data0.5M_cn", "zh", "belle_cn/belle_instructions/belle_data0.5M_cn.json", 519_255, note=_BY_PUBLISHER
    ),
    CatalogEntry("COIG_translate_en", "en", "COIG/translate_en.json", 66_260),
    CatalogEntry("COIG_translate_zh", "zh", "COIG/translate_zh.json", 66_463),
    CatalogEntry("dolly", "en", "dolly/dolly.json", 15_015),
    CatalogEntry("finance_en", "en", "finance/finance_en.json", 68_912, ("finance_en.json",), note=_AT_ROOT),
    CatalogEntry("gpt4all", "en", "GPT4all/gpt4all.json", 806_199, note=_BY_LOG),
    CatalogEntry("GPTeacher", "en", "GPTeacher/GPTeacher.json", 33_548),
    CatalogEntry("instinwild_ch", "zh", "instinwild/instinwild_ch.json", 51_504),
    CatalogEntry("instinwild_en", "en", "instinwild/instinwild_en.json", 52_191),
    CatalogEntry("instruct", "en", "instruct/instruct.json", 888_970, note=_BY_LOG),
    CatalogEntry("sharegpt_zh", "zh", "ShareGPT/sharegpt_zh.json", 158_210),
    CatalogEntry("sharegpt", "en", "ShareGPT/sharegpt.json", 332_648),
    CatalogEntry("Vicuna", "en", "FastChat/Vicuna.json", 51_974),
    CatalogEntry("HC3_ChatGPT", "en", "HC3/HC3_ChatGPT.json", 26_903),
    CatalogEntry("HC3_Human", "en", "HC3/HC3_Human.json", 58_546),
    CatalogEntry("HC3_Chinese_ChatGPT", "zh", "HC3/HC3_Chinese_ChatGPT.json", 17_522),
    CatalogEntry("HC3_Chinese_Human", "zh", "HC3/HC3_Chinese_Human.json", 22_232),
)

CATALOGS: Mapping[str, tuple[CatalogEntry, ...]] = {"bettermixture": BETTERMIXTURE}


def resolve(catalog: str, root: Path) -> list[Source]:
    """Finds the files of a published collection under a folder.

    Each is looked for where the collection keeps it, where other revisions do, and directly in the folder under the
    name of its domain; everywhere also as .jsonl or .parquet, and with .gz or .zst.

    Args:
        catalog: a name of CATALOGS.
        root: the folder of the collection.

    Returns:
        The sources in the order of the catalog.

    Raises:
        ConfigError: there is no such catalog.
        SourceNotFoundError: the folder or some of the files do not exist; it names all of them.
    """
    if catalog not in CATALOGS:
        near = difflib.get_close_matches(catalog, CATALOGS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(CATALOGS)}"
        raise ConfigError(f'there is no catalog "{catalog}"{hint}')
    if not root.is_dir():
        raise SourceNotFoundError(f"{root}: there is no such folder, expected the root of {catalog}; set the data root")
    sources, missing = [], []
    for entry in CATALOGS[catalog]:
        path = next((path for path in _places(entry, root) if path.is_file()), None)
        if path is None:
            missing.append(entry.path)
        else:
            sources.append(Source(entry.name, path))
    if missing:
        raise SourceNotFoundError(
            f"{root}: {len(missing)} of the {len(CATALOGS[catalog])} files of {catalog} are missing:"
            f" {', '.join(missing)};"
            " copy them there (or as <name>.json, .jsonl or .parquet directly in the folder), or list your own sources"
        )
    return sources


def _places(entry: CatalogEntry, root: Path) -> Iterator[Path]:
    for place in (entry.path, *entry.other_paths, f"{entry.name}.json"):
        stem = place.removesuffix(".json")
        for suffix in (".json", ".jsonl", ".parquet"):
            for packed in ("", *COMPRESSED_SUFFIXES):
                yield root / f"{stem}{suffix}{packed}"
