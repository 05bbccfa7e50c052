#!/usr/bin/env bash
# Scaling laws: for each budget of compute a row of models, too small to too large; where in the row is the best one, and how does it
# move with the budget? The last stage fits a parabola to each row and a power law to their bottoms, with error bars.
#
#   bash runs/scaling_laws.sh [--dry-run] [--toy] [--gpus N] [--budgets "1e18 1e19"] [--depths "10 12"] [--shards S] [--device-batch-size B] [--name NAME] [--price P]
#
#   --dry-run     print the plan and the commands; do nothing
#   --toy         two budgets and three depths at toy size on the CPU, with two processes, on the embedded corpus, without downloads
#   --gpus N      GPUs of each machine (default 8)
#   --budgets "…" FLOPs of a training (default "1e18 2.15e18 4.64e18 1e19")
#   --depths "…"  models of each budget (default "10 12 14 16 18 20")
#   --shards S    of the corpus (default: as many as the longest training reads)
#   --device-batch-size B   rows per GPU and micro-step (default: for each depth the most that fits)
#   --name NAME   how the runs are called: NAME_1e18_d12 and so on (default iso)
#   --price P     dollars per hour of the whole machine
#
# Restartable: finished trainings are skipped, an unfinished one goes on from its newest checkpoint. Results are lines of JSON in
# report/results.jsonl, written by the training itself; nothing reads a log.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. runs/_run.sh

budgets='1e18 2.15e18 4.64e18 1e19' depths='10 12 14 16 18 20' shards='' device_batch_size=0 name=iso
options "budgets depths shards device_batch_size name" "$@"
corpus=climbmix ids=32768 characters=2000000000 shape=() eval=(--eval-tokens 4194304) stages="climbmix=${shards:-auto},tokenizer=2e9,train,report"
if [ $toy = 1 ]; then
    gpus=${gpus:-2} budgets='2e9 6e9' depths='1 2 3' corpus=stdlib ids=512 characters=300000 device_batch_size=4
    shape=(--head-dim 32 --aspect-ratio 32 --sequence-len 64 --window-pattern L --total-batch-size 512) eval=(--eval-tokens 512) stages='corpus,tokenizer=3e5,train,report'
fi
gpus=${gpus:-8}
for depth in $depths; do whole depth; done
for budget in $budgets; do [[ $budget =~ ^[0-9.]+(e[0-9]+)?$ ]] || die "--budgets takes FLOPs such as 1e18, not '$budget'"; done

packages "$gpus"
plan "$gpus" --depth "${depths// /,}" --target-flops "${budgets// /,}" --vocab-size "$ids" --device-batch-size "$device_batch_size" ${shape[@]+"${shape[@]}"} --hardware h100 --stages "$stages"

if [ $toy = 1 ]; then
    stage corpus "Corpus: a part of the standard library"
    run python -m nanochat.dataset stdlib --max-bytes 2000000
else
    shards=${shards:-$(told shards)}
    stage climbmix "Corpus: 8 shards now, $shards in the background while the tokenizer trains"
    run python -m nanochat.dataset climbmix --shards $((shards < 8 ? shards : 8))
    run python -m nanochat.dataset climbmix --shards "$shards" --background
fi

stage tokenizer "Tokenizer: $ids byte pairs from $characters characters"
tokenizer "$corpus" "$ids" "$characters"
[ $toy = 1 ] || run python -m nanochat.dataset climbmix --shards "$shards"

row=0
for budget in $budgets; do
    row=$((row + 1))
    for depth in $depths; do
        tag=${name}_${budget}_d$depth
        stage "train$depth.$row" "Budget $budget FLOPs, depth $depth"
        if trained "$tag"; then [ "$node" != 0 ] || echo "$tag is there"
        else launch nanochat.scripts.base_train --depth "$depth" --target-flops "$budget" --corpus "$corpus" --model-tag "$tag" --device-batch-size "$(told "rows$depth")" --eval-every=-1 --keep 1 "${eval[@]}" ${shape[@]+"${shape[@]}"}; fi
    done
done

stage report "The fit"
run python -m nanochat.scripts.scaling_laws --isoflop "${name}_"
[ $dry = 1 ] || done_in "Done in"
