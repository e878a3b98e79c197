"""Domain weights for Megatron-LM and Megatron-Core: how a blend of indexed datasets is sampled.

A blend draws samples of sequence_length tokens each, so that a weight is a share of tokens.  Megatron divides weights
by their sum, requires each to be above 0, and draws by a fixed schedule that stays within a few samples of the shares.
"""

from __future__ import annotations

from doremi_mix.errors import ExportError
from doremi_mix.exporters.export import Export, ExportedFile, Format, json_text
from doremi_mix.exporters.paths import check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan

PREFIX = "tokenized/{name}_text_document"
"""What preprocess_data.py of Megatron-LM calls the .bin and .idx files of a domain."""

OVERSAMPLES = "yes: it starts further epochs of a prefix"
_SURPLUS = (
    "If building the datasets raises IndexError (oversamples), raise mid_level_dataset_surplus: for short runs of many "
    "domains its default of 0.005 can be too little."
)


def zipped_blend(plan: ExportPlan) -> list[str]:
    """Returns weight, prefix, weight, prefix: what get_blend_from_list of Megatron-Core takes.

    A weight stands before every prefix, so that no prefix that looks like a number is taken for a weight.

    Raises:
        ExportError: a prefix is empty, has spaces around it or a suffix, or is that of two domains.
    """
    check_prefixes(plan)
    return [text for domain in plan.domains for text in (repr(domain.token_share), domain.path)]


def check_prefixes(plan: ExportPlan) -> None:
    """Raises for prefixes that Megatron would read as others, or twice.

    Raises:
        ExportError: the message names the domain, the prefix and the reason.
    """
    check_different_paths(plan)
    for domain in plan.domains:
        if domain.path != domain.path.strip():
            raise path_error(domain, "has spaces around it, which Megatron strips")
        if domain.path.endswith((".bin", ".idx")):
            raise path_error(domain, f"ends in {domain.path[-4:]}, but Megatron adds .bin and .idx to it")


def tokens_note(plan: ExportPlan, what: str) -> tuple[str, ...]:
    """Returns what to set so that the budget is drawn and no more, if there is a budget."""
    if plan.token_budget is None:
        return ()
    return (f"To draw the budget set {what} to {plan.token_budget} / sequence length.",)


def _write_arguments_file(plan: ExportPlan) -> Export:
    for domain in plan.domains:
        if len(domain.path.split()) > 1:
            raise ExportError(
                f"the path of domain {domain.name!r} has a space ({domain.path!r}), at which Megatron cuts this file "
                "into arguments; give other paths: --paths, or use --format megatron-per-split"
            )
    blend = zipped_blend(plan)
    lines = [f"{weight} {prefix}\n" for weight, prefix in zip(blend[::2], blend[1::2], strict=True)]
    return Export(
        # Megatron splits the whole file at white space: a comment would be read as prefixes.
        files=(ExportedFile("megatron_blend.txt", "".join(lines), comment=None),),
        expected=plan.token_shares(),
        usage="pretrain_gpt.py --data-args-path megatron_blend.txt --split 100,0,0",
        notes=(
            *tokens_note(plan, "--train-samples"),
            "--split 100,0,0 trains on the whole of every prefix; other splits hold out the end of each.",
            _SURPLUS,
        ),
    )


def _write_per_split(plan: ExportPlan) -> Export:
    # Megatron reads all three keys without asking whether they are there; null is a split without data.
    text = json_text({"train": zipped_blend(plan), "valid": None, "test": None})
    return Export(
        files=(ExportedFile("megatron_blend_per_split.json", text, comment=None),),
        expected=plan.token_shares(),
        usage="pretrain_gpt.py --per-split-data-args-path megatron_blend_per_split.json",
        notes=(
            *tokens_note(plan, "--train-samples"),
            'Nothing is validated or tested on until "valid" and "test" list prefixes; keep all three keys, Megatron '
            "reads each, and do not give --split.",
            _SURPLUS,
        ),
    )


FORMATS = (
    Format(
        name="megatron",
        consumer="megatron-core",
        title="Megatron-LM (--data-args-path)",
        unit="sequences",
        meaning="share",
        oversamples=OVERSAMPLES,
        write=_write_arguments_file,
        path=PREFIX,
    ),
    Format(
        name="megatron-per-split",
        consumer="megatron-core",
        title="Megatron-LM (--per-split-data-args-path)",
        unit="sequences",
        meaning="share",
        oversamples=OVERSAMPLES,
        write=_write_per_split,
        path=PREFIX,
    ),
)
