"""Every setting of every stage on one page.

A setting sits in the section of the stage that it changes, so that the stage's fingerprint sees it.  ``null`` means:
chosen by ``plan.choose`` for the hardware and the data; the run directory keeps what was chosen.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
)

from doremi_mix.errors import ConfigError

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# Marks a setting that does not change a result, such as one of speed or memory: changing it remakes nothing.
_NO_RESULT: Any = {"changes_result": False}


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    def result_settings(self) -> dict[str, Any]:
        """Returns the settings that change the result of the stage, as plain JSON values."""
        fields = type(self).model_fields
        excluded = {name for name, field in fields.items() if field.json_schema_extra == _NO_RESULT}
        return self.model_dump(mode="json", exclude=excluded, by_alias=True)


class SourceConfig(Section):
    """One file; it makes one domain."""

    path: str = Field(description="the file: .json, .jsonl or .parquet, also .gz or .zst; relative to data_root")
    name: str | None = Field(default=None, description="the domain's name; null: the file's stem")
    format: Literal["json", "jsonl", "parquet"] | None = Field(default=None, description="null: detected")
    schema_: Literal["alpaca", "chat", "text"] | None = Field(
        default=None, alias="schema", description="how to read a row; null: detected from the columns"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="which column plays which part, for example {instruction: prompt}"
    )


class LoadConfig(Section):
    """Stage load: read every source into one schema."""

    max_rejected_share: Share = Field(
        default=0.5,
        json_schema_extra=_NO_RESULT,
        description="stop when a larger share of one source's rows is rejected (empty answers count)",
    )


class RuleConfig(Section):
    """The thresholds of one rule; what is not given stays as the preset has it, or as the rule's default."""

    min: float | None = Field(default=None, description="the smallest value that is kept")
    max: float | None = Field(default=None, description="the largest value that is kept")
    min_quantile: Share | None = Field(default=None, description="instead of min: a quantile of each domain's values")
    max_quantile: Share | None = Field(default=None, description="instead of max: a quantile of each domain's values")
    allowed: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = Field(
        default=None, description="of the rule languages: the languages kept"
    )
    applies: Literal["all", "zh", "other"] | None = Field(
        default=None, description="to rows of any script (all), of Chinese script (zh), or of another (other)"
    )
    parameter: PositiveInt | None = Field(default=None, description="characters or words of an n-gram, for repetition")

    @model_serializer(mode="wrap")
    def _only_what_was_given(self, dump: Callable[[RuleConfig], dict[str, Any]]) -> dict[str, Any]:
        """Leaves out what was not given: null would lift a bound of the preset."""
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


def _off(value: object) -> object:
    """YAML reads off as false."""
    return "off" if value is False else value


def _all(value: object) -> object:
    """Whoever switches the choice off wants all of them."""
    return "all" if value is False or value == "off" else value


def _listed(value: object) -> object:
    """One word is a list of one."""
    return (value,) if isinstance(value, str) else value


def _thresholds(value: object) -> object:
    """A rule may be switched on with its defaults (true) and off (false)."""
    if isinstance(value, bool):
        return {} if value else None
    if value is not None and not isinstance(value, Mapping | RuleConfig):
        raise ValueError(
            "must be thresholds, for example {min: 20, max: 2000}, or true or false to switch it on or off"
        )
    return value


class AnalyzeConfig(Section):
    """Stage analyze: what the data are like, before and after filtering."""

    in_run: bool = Field(
        default=False,
        json_schema_extra=_NO_RESULT,
        description="analyze as a part of learn and run; a run that filters always does",
    )
    num_longest: PositiveInt = Field(default=5, description="longest rows to list, of each domain")


class FilterConfig(Section):
    """Stage filter: which of the loaded rows are kept, and why the others are not."""

    preset: Literal["none", "ke_data_juicer", "data_juicer_refine", "second_place"] = Field(
        default="none", description="a published recipe; the settings below go on top of it"
    )
    recipe: str | dict[str, Any] | None = Field(
        default=None, description="instead of a preset: a recipe file of Data-Juicer (YAML); the run keeps its content"
    )
    rules: dict[str, Annotated[RuleConfig | None, BeforeValidator(_thresholds)]] = Field(
        default_factory=dict,
        description="thresholds by rule, for example {text_length: {min: 20, max: 2000}}; true takes the defaults, "
        "false or null switches it off; all rules: doremi-mix rules",
    )
    exact_duplicates: Annotated[Literal["off", "text", "spaces", "characters"] | None, BeforeValidator(_off)] = Field(
        default=None,
        description="drop rows whose text is the same: text (as it is), spaces (case, width and white space folded), "
        "characters (letters alone); null: by the preset",
    )
    priority: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(),
        description="the domains that keep a row that others have too, first ones first; the rest follow in the order "
        "of sources",
    )
    near_duplicates: Annotated[Annotated[float, Field(gt=0, le=1)] | Literal["off"] | None, BeforeValidator(_off)] = (
        Field(
            default=None,
            description="drop rows of this Jaccard similarity to a kept one (0.7), or off; null: by the preset",
        )
    )
    shingle_size: PositiveInt = Field(default=5, description="characters in a shingle of near-duplicate detection")
    num_permutations: Annotated[int, Field(ge=16, le=1024)] = Field(
        default=128, description="length of a MinHash signature: longer is more exact"
    )
    models: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(),
        description="causal LMs that score perplexity and IFD: folders, hub names, .gguf files, or run directories of "
        "ours, whose reference model is taken",
    )
    min_votes: PositiveInt | None = Field(
        default=None, description="models that must find a row within the range; null: the median over models must be"
    )
    ifd: Literal["loss_ratio", "perplexity_ratio"] = Field(
        default="loss_ratio",
        description="how instruction-following difficulty is read: the ratio of mean losses, or of perplexities",
    )
    max_model_tokens: Annotated[int, Field(ge=8)] | None = Field(
        default=None,
        description="tokens of a row that a model reads, longer rows are cut; null: 1,024 for scores and 512 for "
        "embeddings, or as many as the model takes",
    )
    model_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of scoring models")
    trust_remote_code: bool = Field(
        default=False, json_schema_extra=_NO_RESULT, description="let hub models run their own code"
    )
    num_examples: Annotated[PositiveInt | Literal["all"] | None, BeforeValidator(_all)] = Field(
        default=None, description="keep so many diverse examples, or all; null: by the preset"
    )
    per_domain: bool = Field(default=False, description="keep num_examples of each domain, not of all together")
    diversity: Literal["k_center", "facility_location"] = Field(
        default="k_center", description="how diverse examples are chosen; facility_location needs submodlib"
    )
    diversity_shards: PositiveInt = Field(
        default=1,
        description="of k_center: choose in so many parts and then among the chosen, with less memory; no example is "
        "farther from a chosen one than four times the best possible, instead of twice",
    )
    quality_weighted: bool = Field(
        default=False, description="weight distance by instruction-following difficulty when choosing diverse examples"
    )
    embedding: str = Field(
        default="ngrams",
        description="ngrams (hashed character n-grams), an encoder's folder or hub name, or a run directory",
    )
    flagged_words: str | None = Field(
        default=None, description="a file of words, one a line, for the rule flagged_words"
    )
    stopwords: str | None = Field(default=None, description="a file of words, one a line, for the rule stopwords")
    seed: Seed = Field(default=0, description="of hashes")
    executor: Literal["local", "hosts", "slurm", "ray"] = Field(
        default="local",
        json_schema_extra=_NO_RESULT,
        description="who scores rows: processes here, several machines on a shared folder, Slurm, or Ray (the last "
        "three need doremi-mix[cluster])",
    )
    workers: PositiveInt | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="processes (local: in all; hosts: on each machine; slurm and ray: tasks); null: one a core, for "
        "models one a GPU",
    )
    num_hosts: PositiveInt = Field(
        default=1, json_schema_extra=_NO_RESULT, description="machines of the executor hosts, this one included"
    )
    slurm_partition: str | None = Field(default=None, json_schema_extra=_NO_RESULT, description="of the executor slurm")
    slurm_time: str = Field(
        default="04:00:00", json_schema_extra=_NO_RESULT, description="time limit of a Slurm task, hh:mm:ss"
    )


class TokenizeConfig(Section):
    """Stage tokenize: text to packed sequences, and the held-out split."""

    tokenizer: str | None = Field(
        default=None,
        description="folder, tokenizer.json, SentencePiece .model or hub name (best: the main model's own); "
        "null: a byte-level BPE trained on the data",
    )
    trust_remote_code: bool = Field(
        default=False, json_schema_extra=_NO_RESULT, description="let a hub tokenizer run its own code"
    )
    vocab_size: PositiveInt | None = Field(default=None, description="of the trained BPE; null: by the model preset")
    bpe_sample_megabytes: PositiveInt = Field(
        default=32, description="how much text the BPE is trained on, evenly over domains"
    )
    context_length: Annotated[int, Field(ge=8)] | None = Field(
        default=None, description="tokens in a packed sequence of the reference and proxy model; null: by the hardware"
    )
    max_example_tokens: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="where the main model's trainer will cut an example: tokens beyond it are not counted as available "
        "or drawn (the BetterMixture contest: 1024); null: examples are counted whole",
    )
    preamble: str | None = Field(
        default=None, description="the prompt template's first sentence; null: the contest's (Alpaca)"
    )
    turn: str | None = Field(
        default=None, description="the template of one turn, with {query}; the answer follows it; null: the contest's"
    )
    held_out_fraction: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.05, description="share of each domain's examples that is never trained on, to measure loss"
    )
    held_out_max_examples: PositiveInt = Field(default=500, description="at most so many held-out examples in a domain")
    seed: Seed = Field(default=0, description="of the held-out split")


class TrainingConfig(Section):
    """What reference and proxy training share."""

    model: str | None = Field(
        default=None,
        description="a preset (tiny, small, 120m, 280m), a Hugging Face config.json, or a checkpoint "
        "(folder or hub name); null: by the hardware",
    )
    trust_remote_code: bool = Field(
        default=False, json_schema_extra=_NO_RESULT, description="let a hub model run its own code"
    )
    steps: PositiveInt | None = Field(
        default=None,
        description="optimizer steps; null: by the hardware and, for headroom and compare, the token budget",
    )
    batch_size: PositiveInt | None = Field(
        default=None,
        description="sequences in a step, over all processes; null: two per domain or more for proxy.method doremi, "
        "one or more for headroom, few for compare",
    )
    learning_rate: PositiveFloat | None = Field(default=None, description="peak, AdamW; null: by the model")
    embedding_learning_rate: PositiveFloat | None = Field(
        default=None,
        description="peak for token embeddings and output head; null: ten times learning_rate where the weights start "
        "fresh, else the same",
    )
    warmup_share: Share = Field(
        default=0.05, description="share of the steps in which the learning rate rises; then cosine to 10 %"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="AdamW's, on matrices")
    max_grad_norm: PositiveFloat = Field(default=1.0, description="gradients are clipped to this norm")
    seed: Seed = Field(default=0, description="of the initialization and of the order of the data")
    gradient_accumulation_steps: PositiveInt | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="micro-batches in a step and process; null: by the memory",
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="steps between checkpoints; null: twenty checkpoints in all",
    )
    lora_rank: PositiveInt | None = Field(
        default=None,
        description="train LoRA adapters of this rank over a frozen checkpoint; null: all weights are trained",
    )
    lora_alpha: PositiveFloat | None = Field(
        default=None, description="adapters are scaled by alpha / rank; null: twice the rank"
    )
    lora_target_modules: tuple[str, ...] | None = Field(
        default=None, description="names of the layers that get adapters; null: every linear layer of the blocks"
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="keep only the inputs of each block and compute the rest again: less memory, a third more time; "
        "null: no",
    )
    shard: bool | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="FSDP: split weights, gradients and optimizer over the processes, for models too large for one; "
        "null: no",
    )
    compile: bool | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="torch.compile; null: on a GPU, where a measured step is faster and the training long enough",
    )


class ReferenceConfig(TrainingConfig):
    """Stage reference: a plain language model on the reference weights."""

    weights: Literal["natural", "uniform"] | dict[str, float] | None = Field(
        default=None,
        description="natural (each domain's share of the available tokens), uniform, or {domain: weight}; null: "
        "natural for proxy.method doremi, uniform for headroom",
    )
    folds: PositiveInt | None = Field(
        default=None,
        description="references, each of which scores the part of every domain that it was not trained on; 1: one, "
        "which may have seen what it scores; null: 2 where one would pass over a domain more than once, else 1",
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _known_word_or_mapping(cls, value: object) -> object:
        if value not in ("natural", "uniform", None) and not isinstance(value, dict):
            raise ValueError("must be natural, uniform or a mapping of domain to weight")
        return value


class ProxyConfig(TrainingConfig):
    """Stage proxy: learn the weights.  Settings that are null are those of the reference model.

    With the method headroom, ``steps`` that are null are half of the reference model's.
    """

    method: Literal["headroom", "doremi"] = Field(
        default="headroom",
        description="headroom: weight in proportion to what a longer training still gains on a domain; doremi: "
        "Algorithm 1 of the DoReMi paper",
    )
    token_budget: PositiveInt | None = Field(
        default=None,
        description="learn for this budget: no domain gets more weight than mixture.max_epochs passes over it fill; "
        "null: mixture.token_budget, where learn or run is given one",
    )
    power: PositiveFloat = Field(default=1.0, description="of headroom: weights go with the headroom to this power")
    step_size: PositiveFloat = Field(default=1.0, description="of doremi: eta, the learning rate of the weights")
    smoothing: Share = Field(
        default=1e-3, description="c, the share of the weights given back to uniform at each update"
    )


class WeightsConfig(Section):
    """Stage weights: how many draws, in how many rounds, and how far the result is pulled toward a plain mixture."""

    num_seeds: PositiveInt = Field(
        default=1,
        json_schema_extra=_NO_RESULT,
        description="proxies, each with another initialization and order of the data; the weights are their mean",
    )
    vary_reference: bool = Field(
        default=False, json_schema_extra=_NO_RESULT, description="train a reference of its own for each seed, too"
    )
    max_rounds: PositiveInt = Field(
        default=1,
        json_schema_extra=_NO_RESULT,
        description="iterated DoReMi: each round's reference is trained on the weights of the round before",
    )
    round_tolerance: PositiveFloat = Field(
        default=1e-3,
        json_schema_extra=_NO_RESULT,
        description="stop the rounds when no weight differs by more from the reference weights (the paper's rule)",
    )
    shrink: Share | Literal["evidence"] | None = Field(
        default=None,
        description="pull toward shrink_toward: 0 not at all, 1 entirely, evidence: by the spread over seeds; null: "
        "0.5 for proxy.method headroom, 0 for doremi",
    )
    shrink_toward: Literal["uniform", "natural"] = Field(default="uniform", description="the plain mixture to pull to")
    shrink_kind: Literal["linear", "kl"] = Field(
        default="linear", description="linear: an arithmetic mean; kl: a geometric one"
    )


class CompareConfig(TrainingConfig):
    """Stage compare: fresh small models on the learned mixture and on plain ones.

    Settings that are null are those of the proxy model.
    """

    in_run: bool = Field(
        default=False,
        json_schema_extra=_NO_RESULT,
        description="compare as a part of learn and run, before the mixture",
    )
    num_seeds: PositiveInt = Field(default=3, description="models per mixture; the same seeds for every mixture")
    token_budget: PositiveInt | None = Field(
        default=None,
        description="tokens that each model is trained on; null: mixture.token_budget, at most what the hardware "
        "is good for. Where it is smaller than the mixture's, domains are cut in proportion, so that each is repeated "
        "as often as in the mixture",
    )
    temperature: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="the temperature mixture: natural weights to this power, normalized"
    )
    also: dict[str, str] = Field(
        default_factory=dict, description="more mixtures to enter, {name: domain_weights.json}"
    )


MIXTURE_WORDS = ("learned", "natural", "uniform", "temperature", "best")


class MixtureConfig(Section):
    """Stage mixture: draw the training set."""

    weights: str = Field(
        default="learned",
        description="learned, natural, uniform, temperature, best (of what compare found), or a file of "
        "weights: ours, or another program's",
    )
    token_budget: PositiveInt | None = Field(
        default=None, description="tokens to draw, after the template; null: no mixture is drawn"
    )
    max_epochs: PositiveFloat = Field(default=4.0, description="no domain is repeated more often than this")
    seed: Seed = Field(default=0, description="of the draw and of the order")


class ExportConfig(Section):
    """Stage export: the weights that the mixture is drawn with, for other programs."""

    formats: Annotated[tuple[str, ...], AfterValidator(lambda names: tuple(dict.fromkeys(names)))] = Field(
        default=(), description="names of doremi-mix export --list; empty: no export"
    )
    paths: str | None = Field(
        default=None,
        description="what the programs read: a template with {name}, or a file of path by domain; null: the loaded "
        "files, or with export.data those that it writes",
    )
    data: bool = Field(
        default=False,
        description="also write the rows to train on, one file a domain: kept by the filter, not held out, shuffled, "
        "all with instruction, input, output, system and messages",
    )
    seed: Seed = Field(default=0, description="for programs that ask for one")


class FinetuneConfig(Section):
    """Stage finetune: LoRA over the main model, trained on the mixture.

    Settings that are null are the preset's.  ``contest`` has the rules of the BetterMixture challenge, which left
    learning rate, packing and quantization free; ``modern`` trains every linear layer on packed documents.
    """

    preset: Literal["contest", "modern"] = Field(default="contest", description="what is meant by null below")
    model: str | None = Field(
        default=None,
        description="the main model, a checkpoint (folder or hub name; Baichuan2: what doremi-mix baichuan convert "
        "wrote); null: no fine-tune",
    )
    trust_remote_code: bool = Field(
        default=False, json_schema_extra=_NO_RESULT, description="let a hub model run its own code"
    )
    tokenizer: str | None = Field(default=None, description="null: the model's own")
    data: str | None = Field(
        default=None,
        description="a file of examples to train on, in its order (.json, .jsonl or .parquet); null: the run's mixture",
    )
    token_budget: PositiveInt | None = Field(
        default=None,
        description="train on the first examples that fill it, counted once whatever the epochs; null: contest "
        "10,000,000, modern all",
    )
    max_example_tokens: Annotated[int, Field(ge=8)] | None = Field(
        default=None,
        description="tokens at which an example is cut, question and answer in proportion, and the length of a packed "
        "sequence (of blocks only that: they cut no example); null: tokenize.max_example_tokens, else contest 1,024, "
        "modern 2,048",
    )
    packing: Literal["none", "documents", "blocks"] | None = Field(
        default=None,
        description="none: one example a sequence; documents: whole examples that do not see each other; blocks: cut "
        "from all examples end to end, as the contest's trainer packs; null: contest none, modern documents",
    )
    skip_plain_text: bool | None = Field(
        default=None,
        description="pass over plain text, which asks nothing, as the contest's trainer does; null: contest true, "
        "modern false",
    )
    epochs: PositiveInt = Field(default=3, description="passes over the examples")
    batch_size: PositiveInt | None = Field(
        default=None, description="sequences in a step, over all processes; null: contest 256, modern 64"
    )
    learning_rate: PositiveFloat | None = Field(
        default=None,
        description="peak, AdamW (the contest allowed 1e-3, 1e-4, 1e-5); null: contest 1e-3, modern 2e-4",
    )
    warmup_share: Share = Field(
        default=0.03, description="share of the steps in which the learning rate rises; then cosine to 0"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW's, on matrices")
    max_grad_norm: PositiveFloat = Field(default=1.0, description="gradients are clipped to this norm")
    lora_rank: PositiveInt | None = Field(default=None, description="of the adapters; null: contest 8, modern 16")
    lora_alpha: PositiveFloat | None = Field(
        default=None, description="adapters are scaled by alpha / rank; null: contest 16, modern 32"
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="of what goes into an adapter; null: contest 0.1, modern 0.05"
    )
    lora_target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="names of the layers that get adapters; null: contest q_proj, k_proj, v_proj, modern every linear "
        "layer of the blocks",
    )
    lora_shared_input: bool | None = Field(
        default=None,
        description="one matrix A for q_proj, k_proj and v_proj, as where they are one layer (W_pack of Baichuan); "
        "null: contest true, modern false",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        default="none", description="hold the frozen weights in fewer bits (needs bitsandbytes)"
    )
    seed: Seed = Field(default=42, description="of the adapters' initialization, the dropout and the order of the data")
    micro_batch_size: PositiveInt | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="sequences in a forward pass of a process; null: by the memory (it decides which inputs the "
        "dropout drops, and nothing else)",
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="steps between checkpoints; null: twenty checkpoints in all",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="keep only the inputs of each block and compute the rest again: less memory, a third more time; "
        "null: on a GPU",
    )
    shard: bool | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="FSDP: split the weights over the processes, for models too large for one; null: no",
    )
    compile: bool | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="torch.compile; null: no (batches differ in length, and each length is compiled anew)",
    )


class EvaluateConfig(Section):
    """Stage evaluate: what the fine-tune changed, by held-out loss of every domain and, if wanted, by benchmarks."""

    held_out_examples: Annotated[int, Field(ge=0)] = Field(
        default=100, description="held-out examples of each domain to score; 0: none"
    )
    tasks: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(),
        description="benchmarks, by lm-eval's names; contest: the seven of the BetterMixture challenge with its shots "
        "and its score (needs doremi-mix[evaluate])",
    )
    task_folder: str | None = Field(
        default=None, description="task files of lm-eval (YAML) that go before its own, for work without a connection"
    )
    semi_final_task_folder: str | None = Field(
        default=None,
        description="the same tasks with other items: scored too, and the final score is half of each",
    )
    num_fewshot: Annotated[int, Field(ge=0)] | dict[str, Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description="worked examples before a question, one number or {task: number}; null: as the contest or the task "
        "has it",
    )
    limit: PositiveInt | None = Field(default=100, description="items of a task at most; null: all")
    max_length: Annotated[int, Field(ge=8)] = Field(default=1024, description="tokens that the model reads of a prompt")
    batch_size: PositiveInt | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="prompts in a forward pass; null: 8 on a GPU, else 1 (each holds the logits of all its tokens)",
    )
    base_scores: Literal["measured", "published"] = Field(
        default="measured",
        description="of the contest: divide by the scores of the main model without adapter, or by those that were "
        "published for Baichuan2-7B-Base",
    )
    seed: Seed = Field(default=42, description="of the choice of shown examples")


class TrackingConfig(Section):
    """Where training is logged besides metrics.jsonl."""

    trackers: tuple[Literal["wandb", "tensorboard"], ...] = Field(
        default=(), json_schema_extra=_NO_RESULT, description="any of wandb and tensorboard"
    )
    project: str = Field(default="doremi_mix", json_schema_extra=_NO_RESULT, description="wandb's project")
    run_name: str | None = Field(
        default=None, json_schema_extra=_NO_RESULT, description="null: the name of the run directory"
    )
    wandb_mode: Literal["online", "offline"] = Field(
        default="online", json_schema_extra=_NO_RESULT, description="offline: kept in the run directory for wandb sync"
    )


class Config(Section):
    """The whole configuration; sections are in the order of the stages."""

    sources: tuple[SourceConfig, ...] = Field(default=(), description="the files, each of which makes one domain")
    catalog: str | None = Field(
        default=None, description="instead of sources: a known collection under data_root (bettermixture)"
    )
    data_root: str | None = Field(default=None, description="where relative paths start; null: the folder of this file")
    load: LoadConfig = LoadConfig()
    analyze: AnalyzeConfig = AnalyzeConfig()
    filter: FilterConfig = FilterConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    reference: ReferenceConfig = ReferenceConfig()
    proxy: ProxyConfig = ProxyConfig()
    weights: WeightsConfig = WeightsConfig()
    compare: CompareConfig = CompareConfig()
    mixture: MixtureConfig = MixtureConfig()
    export: ExportConfig = ExportConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()


def parse_config(data: Mapping[str, Any], *, where: str = "config") -> Config:
    """Validates a plain mapping.

    Args:
        data: as read from YAML.
        where: what to name in an error, usually the file.

    Raises:
        ConfigError: a key is unknown (with the nearest known one), or a value is of the wrong kind.
    """
    # A section whose settings were all deleted is an empty one.
    data = {key: {} if value is None and _is_section(key) else value for key, value in data.items()}
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error)}") from None
    if bool(config.sources) == (config.catalog is not None):
        got = "both" if config.sources else "neither"
        raise ConfigError(f"{where}: expected either sources (a list of files) or catalog (bettermixture), got {got}")
    return config


# What a person calls the kinds of values that pydantic's messages name in its own terms.
_KINDS = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of settings",
}


def _describe(error: ValidationError) -> str:
    """Returns the first problem as one line: which key, expected, got, and the nearest key for an unknown one."""
    problems = error.errors(include_url=False)
    # An unknown key explains more than what follows from it.
    deepest = max(problems, key=lambda p: len(p["loc"]))
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), deepest)
    key = _dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        prefix = _dotted(problem["loc"][:-1])
        hint = (
            f"did you mean {prefix + '.' if prefix else ''}{nearest[0]}?" if nearest else f"known: {', '.join(known)}"
        )
        return f"unknown key {key}; {hint}"
    if problem["type"] == "missing":
        return f"{key} is missing; {_description(problem['loc'])}"
    if problem["type"] == "invalid_key":
        return f"key {problem['loc'][-2]!r} must be text; quote it"
    got = problem["input"]
    got_text = repr(got) if isinstance(got, str | int | float | bool | None.__class__) else f"a {type(got).__name__}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = next((words for kind, words in _KINDS.items() if problem["type"].startswith(kind)), message)
    return f"{key} must be {message.removeprefix('must be ')}, got {got_text}"


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() or not text:
            # Union branches show up as type names such as tuple[SourceConfig, ...]; they are no keys.
            text += f".{part}" if text else part
    return text


def section_of(location: tuple[int | str, ...]) -> type[Section]:
    """Returns the section that a path of keys leads to."""
    section: type[Section] = Config
    for part in location:
        if part == "sources":
            section = SourceConfig
        elif part == "rules" and section is FilterConfig:
            section = RuleConfig
        elif isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, Section):
                section = annotation
    return section


def _is_section(key: str) -> bool:
    field = Config.model_fields.get(key)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    return [field.alias or name for name, field in section_of(location).model_fields.items()]


def _description(location: tuple[int | str, ...]) -> str:
    field = section_of(location[:-1]).model_fields.get(str(location[-1]))
    return f"expected {field.description}" if field is not None else "see doremi-mix init"
