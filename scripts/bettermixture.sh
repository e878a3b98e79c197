#!/usr/bin/env bash
# From 20 instruction datasets to the score of a fine-tuned Baichuan2-7B, by the BetterMixture challenge's rules.
#   bash scripts/bettermixture.sh DATA BAICHUAN2 [RUN_DIR]
#     DATA: the folder of the Alpaca-CoT collection; BAICHUAN2: the folder of Baichuan2-7B-Base as published.
#   bash scripts/bettermixture.sh --tiny TOKENIZER DATA [RUN_DIR]
#     The same on a CPU in minutes: a small random Baichuan2 with the tokenizer files in TOKENIZER, 200,000 tokens of the
#     JSON files in DATA, and made-up benchmark items.  Its score says nothing; every step is the real one.
# Each step says what it takes on one H100 80 GB, by scripts/bettermixture_costs.py: computed, not measured, on a GPU.
set -euo pipefail
usage() { sed -n '3,7p' "$0" >&2; exit 2; }
tiny=""
if [ "${1:-}" = "--tiny" ]; then tiny=yes; shift; fi
[ $# -ge 2 ] || usage
if [ -n "$tiny" ]; then tokenizer=$(realpath "$1"); data=$(realpath "$2"); else data=$(realpath "$1"); original=$(realpath "$2"); fi
run=$(realpath -m "${3:-runs/bettermixture}")
settings=()
echo "1/7 virtual environment, torch, doremi-mix with LoRA and benchmarks"
. "$(dirname "$0")/venv.sh"
pip install --quiet -e '.[lora,filter,evaluate]'
if [ -n "$tiny" ]; then
    echo "    tiny: a random Baichuan2 in its published layout, a proxy's config, made-up benchmark items"
    python scripts/tiny_bettermixture.py "$tokenizer" "$run-tiny"
    original="$run-tiny/baichuan2"
    settings=(--set "reference.model=$run-tiny/proxy/config.json" --set reference.steps=40 --set tokenize.context_length=256
        --set tokenize.held_out_max_examples=30
        --set mixture.token_budget=200000 --set finetune.batch_size=32 --set finetune.learning_rate=0.003
        --set "evaluate.task_folder=$run-tiny/tasks" --set evaluate.limit=3 --set evaluate.held_out_examples=10
        --set "evaluate.num_fewshot={arc_challenge: 2, hellaswag: 2, mmlu: 2, cmmlu: 2, gsm8k: 2}")
fi
model="$run-llama"
cost() { echo "${tiny:+the real one: }$(python scripts/bettermixture_costs.py --only "$@")"; }
echo "2/7 Baichuan2 to Llama layout ($(cost convert))"
doremi-mix baichuan convert "$original" "$model"
settings+=(--set "tokenize.tokenizer=$model")
echo "3/7 load, filter, tokenize, learn the weights with small proxy models, draw the mixture" \
    "($(cost load analyze filter tokenize reference proxy mixture))"
if [ -n "$tiny" ]; then
    doremi-mix learn "$data" --config configs/baichuan2_lora.yaml --run-dir "$run" "${settings[@]}"
else
    doremi-mix run configs/baichuan2_lora.yaml --run-dir "$run" --set "data_root=$data" "${settings[@]}"
fi
echo "4/7 fine-tune the main model on the mixture ($(cost "finetune, micro-batch 64"))"
doremi-mix finetune --run-dir "$run" --set "finetune.model=$model"
echo "5/7 base and tuned model: held-out loss of every domain, seven benchmarks, the score ($(cost evaluate))"
doremi-mix evaluate --run-dir "$run"
if [ -n "$tiny" ]; then
    echo "    tiny: a random model solves nothing, and a ratio to nothing is none; the same against the published base scores"
    doremi-mix evaluate --run-dir "$run" --set evaluate.base_scores=published
fi
echo "6/7 the adapter for Baichuan2's original layout"
rm -rf "$run-adapter-w-pack" "$run-merged"
doremi-mix adapter "$run" "$run-adapter-w-pack" --form w-pack --base "$original"
echo "7/7 the tuned model without adapters ($(cost convert))"
doremi-mix adapter "$run" "$run-merged" --form merged
echo "scores: $run/evaluate/metrics.json  adapter: $run/finetune/adapter  model: $run-merged"
