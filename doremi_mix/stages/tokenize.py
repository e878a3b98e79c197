"""Stage tokenize: text to packed token sequences, and the held-out split.

Writes the token store (see ``store.TokenStore``), ``tokenizer.json`` (what identifies the tokenizer) and, when one is
trained, ``bpe/tokenizer.json``, which transformers and tokenizers can load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from doremi_mix.atomic import write_json
from doremi_mix.bpe import train_byte_level_bpe
from doremi_mix.config import TokenizeConfig
from doremi_mix.fingerprints import rows_stage
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import loaded_path, read_examples, read_summary
from doremi_mix.store import ArrayWriter, TokenStore, TokenStoreWriter
from doremi_mix.tokenizer import Tokenizer, load_tokenizer
from doremi_mix.tokens import CONTEST_TEMPLATE, Template, encode_examples, held_out_split, prompt_key, render, truncate
from doremi_mix.types import Domains

CHUNK_SIZE = 512


def make_template(config: TokenizeConfig) -> Template:
    """Returns the prompt template of a configuration: the contest's, with what was given in its place."""
    given = {"preamble": config.preamble, "turn": config.turn}
    return dataclasses.replace(CONTEST_TEMPLATE, **{key: text for key, text in given.items() if text is not None})


def run(context: StageContext) -> str:
    """Tokenizes what was loaded; returns one line about it."""
    config = context.config.tokenize
    rows_folder = context.run.stage_path(rows_stage(context.config))
    summary = read_summary(rows_folder)
    domains = Domains(tuple(domain["domain"] for domain in summary))
    template = make_template(config)
    tokenizer = _get_tokenizer(context, config, domains, rows_folder)
    ends = []
    assert config.context_length is not None
    writer = TokenStoreWriter(
        context.folder,
        domains,
        context_length=config.context_length,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
    )
    num_rows = sum(domain["num_kept"] for domain in summary)
    with (
        writer,
        closing(ArrayWriter(context.folder / ".prompt_keys.tmp", np.uint64)) as keys,
        context.narrator.track("tokenize", num_rows, "rows") as tracker,
    ):
        for domain_id, name in enumerate(domains):
            for examples in read_examples(rows_folder, name, CHUNK_SIZE):
                encoded = encode_examples(examples, tokenizer, template)
                if config.max_example_tokens is not None:
                    encoded = truncate(encoded, config.max_example_tokens)
                # What an example costs of a budget is counted before the proxy's shorter context cuts it.
                in_context = truncate(encoded, config.context_length, answers_first=True)
                writer.append(domain_id, in_context, encoded.lengths)
                keys.append(np.fromiter(map(prompt_key, examples), dtype=np.uint64, count=len(examples)))
                tracker.advance(len(examples), name)
            ends.append(keys.length)
        held_out = held_out_split(
            np.split(keys.read(), ends[:-1]), config.held_out_fraction, config.held_out_max_examples, config.seed
        )
        writer.finish(held_out)
        keys.remove()
    write_json(
        context.folder / "tokenizer.json",
        {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "end_id": tokenizer.end_id,
            "pad_id": tokenizer.pad_id,
            "template": dataclasses.asdict(template),
        },
    )
    for name, flags in zip(domains, held_out, strict=True):
        if not flags.any():
            context.narrator.say(f"  {name}: all rows share one prompt, so none can be held out to measure its loss")
    return _line(TokenStore(context.folder))


def _get_tokenizer(context: StageContext, config: TokenizeConfig, domains: Domains, rows_folder: Path) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    assert config.vocab_size is not None
    folder = context.folder / "bpe"
    folder.mkdir()
    context.narrator.say(f"  training a byte-level BPE of {config.vocab_size:,} tokens on the data")
    share = config.bpe_sample_megabytes * 10**6 // len(domains)
    trained = train_byte_level_bpe(_sample_texts(domains, rows_folder, make_template(config), share), config.vocab_size)
    path = folder / "tokenizer.json"
    trained.save(str(path))
    return dataclasses.replace(
        load_tokenizer(str(path)), name=f"byte-level BPE of {config.vocab_size}, trained on the data"
    )


def _sample_texts(domains: Domains, rows_folder: Path, template: Template, bytes_per_domain: int) -> Iterator[str]:
    """Yields texts of every domain, evenly spread over its rows, up to about so many characters of each."""
    for name in domains:
        # Rows are compressed on disk to about a third; a domain that may exceed its share is thinned out evenly.
        stride = max(1, loaded_path(rows_folder, name).stat().st_size // bytes_per_domain)
        num_characters = 0
        position = 0
        for examples in read_examples(rows_folder, name, CHUNK_SIZE):
            for example in examples:
                position += 1
                if position % stride or num_characters >= bytes_per_domain:
                    continue
                # As it will be encoded: the template's own words stand before every example.
                for prompt, response in render(example, template):
                    num_characters += len(prompt) + len(response)
                    yield prompt
                    yield response
            if num_characters >= bytes_per_domain:
                break


def _line(store: TokenStore) -> str:
    total = sum(store.available_tokens)
    truncated = sum(summary["truncated_examples"] for summary in store.summaries)
    cut = f"; {truncated:,} examples longer than that were cut for the proxy" if truncated else ""
    return f"{total:,} tokens available, {store.num_sequences():,} sequences of {store.context_length} tokens{cut}"
