#!/usr/bin/env bash
# What to measure on a borrowed GPU, in three calls of at most ten minutes each:
#
#   scripts/gpu_session.sh 1     the shapes of Qwen2.5-7B, 32B and 14B: training, decoding, prediction (scale.py)
#   scripts/gpu_session.sh 2     what is left of it; training cost of 7B with every method (training_cost.py)
#   scripts/gpu_session.sh 3     cost against quality on a real run (predictive.py); cells of recipes/paper.yaml
#
# Without a number: all three. --toy: the same at toy size on a CPU, in a few minutes. Nothing is fetched. A step that
# fails, or that its time is up for, does not stop the next one. Everything is kept in $WORK (runs/gpu-session), from
# where a second call goes on; where $OUT is set, the pages and an archive of the small files are put there too. Part 3
# needs the base model $BASE (smollm2-135m-instruct, or a directory).
set -uo pipefail
cd "$(dirname "$0")/.."

TOY=0
PARTS=()
for argument in "$@"; do
    case "$argument" in
        --toy) TOY=1 ;;
        1 | 2 | 3) PARTS+=("$argument") ;;
        *)
            echo "usage: scripts/gpu_session.sh [--toy] [1] [2] [3]" >&2
            exit 2
            ;;
    esac
done
[ ${#PARTS[@]} -gt 0 ] || PARTS=(1 2 3)

PYTHON=${PYTHON:-python3}
BASE=${BASE:-smollm2-135m-instruct}
WORK=${WORK:-runs/gpu-session}
[ "$TOY" = 0 ] || WORK=$WORK-toy
mkdir -p "$WORK"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}

left() { echo $((END - $(date +%s))); }

# step SECONDS NAME COMMAND...: at most so long, and no longer than what is left of the part
step() {
    local limit=$1 name=$2 rest
    shift 2
    rest=$(left)
    [ "$limit" -le "$rest" ] || limit=$rest
    if [ "$limit" -lt 5 ]; then
        echo "== $name: not begun, the time is up"
        return 1
    fi
    echo "== $name, at most $limit s"
    # an interrupt first: what is resumable ends in order
    timeout --signal=INT --kill-after=20 "$limit" "$@" >"$WORK/$name.log" 2>&1
    local status=$?
    tail -n 25 "$WORK/$name.log"
    echo "== $name: exit status $status"
    return $status
}

deliver() {
    [ -n "${OUT:-}" ] || return 0
    mkdir -p "$OUT"
    tar -czf "$OUT/gpu-session-$1.tar.gz" -C "$WORK" --exclude='*.safetensors' --exclude='*.pt' --exclude='*.bin' . ||
        echo "== the archive is not whole"
    for page in "$WORK"/*/scale.md "$WORK"/*/training_cost.md "$WORK"/*/predictive.md "$WORK"/paper/README.md; do
        [ ! -f "$page" ] || cp "$page" "$OUT/"
    done
}

# 540 s with what a start of Python takes; the rest of ten minutes is for the archive
scale() {
    local seconds=$1
    if [ "$TOY" = 1 ]; then
        step "$seconds" scale "$PYTHON" benchmarks/scale.py --device cpu --models tiny --batches 1 2 --length 8 --steps 3 \
            --rounds 2 --samples 3 --new-tokens 3 --budget $((seconds - 20)) --output "$WORK/scale"
    else
        step "$seconds" scale "$PYTHON" benchmarks/scale.py --device cuda --budget $((seconds - 20)) \
            --output "$WORK/scale"
    fi
}

training_cost() {
    if [ "$TOY" = 1 ]; then
        step 300 training_cost "$PYTHON" benchmarks/training_cost.py --shape tiny --length 8 --rounds 3 --warmup 1 \
            --memory-repeats 1 --memory-steps 2 --methods scalabl --output "$WORK/training_cost"
    else
        step 320 training_cost "$PYTHON" benchmarks/training_cost.py --shape qwen2.5-7b --device cuda --dtype bfloat16 \
            --length 300 --rounds 20 --memory-repeats 1 --memory-steps 2 --methods scalabl scalabl-full \
            --output "$WORK/training_cost"
    fi
}

# a tiny random base model and questions for it, for the toy size
toy_data() {
    [ -d "$WORK/base" ] || PYTHONPATH=$PYTHONPATH:tests "$PYTHON" - "$WORK" <<'PYTHON'
import shutil, sys
from pathlib import Path
from tiny_base import as_json, questions, tiny_base, write_jsonl

work = Path(sys.argv[1])
for seed, (split, number) in enumerate((("train", 16), ("validation", 6), ("test", 9))):
    write_jsonl(work / "task" / f"{split}.jsonl", map(as_json, questions(number, choices=(4,), seed=seed)))
write_jsonl(work / "shifted.jsonl", map(as_json, questions(4, choices=(4,), seed=9)))
shutil.copytree(tiny_base(), work / "base")
PYTHON
}

predictive() {
    local run=$WORK/run
    if [ "$TOY" = 1 ]; then
        step 60 train "$PYTHON" -m scalabl train --model "$WORK/base" --data "$WORK/task" --steps 2 --rank 4 \
            --layers last:2 --scoring continuation --output "$run" || return
        step 200 predictive "$PYTHON" benchmarks/predictive.py --run "$run" --ood "$WORK/shifted.jsonl" --rows 9 \
            --ood-rows 4 --samples 4 --reference 16 --reference-rows 3 --batches 1 --rounds 2 --variance-rows 3 \
            --top last:1 --work "$WORK/predictive-work" --output "$WORK/predictive"
    else
        step 120 train "$PYTHON" -m scalabl train --config recipes/arc-easy.yaml --model "$BASE" --output "$run" ||
            return
        step 200 predictive "$PYTHON" benchmarks/predictive.py --run "$run" --batches 1 8 32 \
            --work "$WORK/predictive-work" --output "$WORK/predictive"
    fi
}

# the paper's settings on the packaged task: plain LoRA, BLoB and ScalaBL, one seed
paper() {
    "$PYTHON" - "$WORK" "$BASE" "$TOY" >"$WORK/paper.yaml" <<'PYTHON' || return
import sys
from pathlib import Path
import yaml

work, base, toy = sys.argv[1:]
study = yaml.safe_load(Path("recipes/paper.yaml").read_text(encoding="utf-8"))
study |= {"name": "paper-gpu", "model": base, "tasks": ["arc-easy"], "shift": {}, "seeds": [0]}
study["methods"] = ["mle", "blob", "scalabl", {"name": "scalabl auto", "method": "scalabl", "predictive": "auto"}]
del study["results"]
if toy == "1":
    study |= {"model": f"{work}/base", "tasks": [f"{work}/task"], "samples": 2, "validation_rows": 4}
    study["settings"] |= {"steps": 2, "r": 4, "target_modules": "q_proj,v_proj", "save_steps": 2}
print(yaml.safe_dump(study, sort_keys=False))
PYTHON
    local study=("$PYTHON" -m scalabl benchmark "$WORK/paper.yaml" --output "$WORK/cells" --results "$WORK/paper")
    step 400 paper "${study[@]}" || step 60 paper-tables "${study[@]}" --tables-only
}

for part in "${PARTS[@]}"; do
    END=$(($(date +%s) + 575))
    echo "== part $part, $(date -u +%H:%M:%S)"
    case "$part" in
        1) scale 560 ;;
        2)
            training_cost
            scale "$(left)"
            ;;
        3)
            [ "$TOY" = 0 ] || toy_data
            predictive
            paper
            ;;
    esac
    deliver "$part"
done
exit 0
