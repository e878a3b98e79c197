#!/usr/bin/env bash
# Everything that only a GPU can show, on one GPU, in about eight minutes.
#   bash scripts/bench/gpu.sh DATA OUT [PART...]
#     DATA: a folder of instruction datasets (JSON); OUT: a folder for the logs, one of each part.
#     PART: machine, tests, demo, learn, finetune, loss, train, scores; all of them if none is given.
# Each part has a time limit, and one that fails does not stop the others.  Without a GPU the parts run in small sizes.
# PYTHON names the interpreter that has doremi_mix's dependencies; LIMIT multiplies the time limits.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '3,7p' "$0" >&2; exit 2; }
data=$(realpath "$1"); out=$(realpath -m "$2"); shift 2
parts=" ${*:-machine tests demo learn finetune loss train scores} "
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gpu=$("$python" -c "import torch; print('yes' if torch.cuda.is_available() else '')")
failed=""

wanted() { [[ "$parts" == *" $1 "* ]]; }

# limited SECONDS LOG COMMAND...: runs a command, adds what it prints to a log, and says how it ended.
limited() {
    local limit=$(($1 * ${LIMIT:-1})) log="$out/$2.log" start=$SECONDS code=0
    shift 2
    echo "\$ $*" >>"$log"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || code=$?
    echo "(exit $code after $((SECONDS - start)) s)" >>"$log"
    if [ "$code" -eq 0 ]; then
        echo "    done in $((SECONDS - start)) s; $log"
    else
        failed="$failed $(basename "$log" .log)"
        echo "    exit $code after $((SECONDS - start)) s; $log ends with:"
        tail -n 5 "$log" | sed 's/^/    | /'
    fi
}

# The most memory of the GPU that anything used while a command ran, libraries and caches included.
watched() {
    local log="$2" watcher=""
    if [ -n "$gpu" ]; then
        nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader,nounits -lms 250 \
            >"$work/memory" 2>/dev/null &
        watcher=$!
    fi
    limited "$@"
    if [ -n "$watcher" ]; then
        kill "$watcher" 2>/dev/null
        sort -n "$work/memory" | awk -F, 'END { print "GPU memory at most " $1 " MiB" }' >>"$out/$log.log"
    fi
}

if wanted machine; then
    echo "1/8 the machine"
    limited 60 machine "$python" -c "
import accelerate, torch, transformers
print('torch', torch.__version__, 'transformers', transformers.__version__, 'accelerate', accelerate.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
    [ -z "$gpu" ] || limited 30 machine nvidia-smi
fi
if wanted tests; then
    echo "2/8 tests that need a GPU"
    limited 150 tests "$python" -m pytest tests/test_cuda.py tests/test_shrinkage.py -k "gpu or cuda" -vv -rs \
        -W default --no-header --show-capture no -p no:cacheprovider --durations 10 --tb short ${gpu:+-n 4}
fi
if wanted demo; then
    echo "3/8 the demo: 20 made-up domains with a known answer"
    watched 120 demo "$python" -m doremi_mix demo --run-dir "$work/demo"
    limited 30 demo "$python" scripts/bench/speed.py "$work/demo"
fi
if wanted learn; then
    echo "4/8 real files: weights by two small models, of the size that this machine gets"
    size=(--token-budget 6000000)
    [ -n "$gpu" ] || size=(--token-budget 60000 --set reference.steps=48)
    watched 150 learn "$python" -m doremi_mix learn "$data" --run-dir "$work/learn" "${size[@]}"
    limited 30 learn "$python" scripts/bench/speed.py "$work/learn"
fi
if wanted finetune; then
    echo "5/8 a step of the contest's fine-tune of a 7B"
    size=(--repeats 2 --micro-batch 8)
    [ -n "$gpu" ] || size=(--shape tiny7b --length 64 --micro-batch 4 --sequences 8 --repeats 1)
    watched 120 finetune "$python" scripts/bench/finetune.py "${size[@]}"
fi
if wanted loss; then
    echo "6/8 time and memory of the loss"
    size=(--pairs 3)
    [ -n "$gpu" ] || size=(--pairs 1 --tokens 256 --hidden 64 --vocab 4096)
    limited 150 loss "$python" scripts/bench/loss.py "${size[@]}"
fi
if wanted train; then
    echo "7/8 training steps: tokens per second, MFU, memory, and where the time goes"
    size=(--only gpu)
    [ -n "$gpu" ] || size=(--only dro --pairs 1 --steps 1)
    limited 200 train "$python" scripts/bench/train.py "${size[@]}"
    size=(--only trainer --pairs 2 --steps 8)
    [ -z "$gpu" ] || limited 120 train "$python" scripts/bench/train.py "${size[@]}"
fi
if wanted scores; then
    echo "8/8 perplexity and IFD"
    size=(--models small --rows 60 --pairs 3)
    [ -n "$gpu" ] || size=(--models tiny --rows 4 --pairs 1)
    limited 60 scores "$python" scripts/bench/model_scores.py "$data"/*.json "${size[@]}"
fi
if [ -n "$failed" ]; then echo "failed:$failed"; exit 1; fi
echo "all parts are done"
