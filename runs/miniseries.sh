#!/usr/bin/env bash
# The miniseries: one model for each depth from 12 to 26, all by the depth dial, each with its CORE score. If the dial is right, loss over
# compute is a smooth curve. About a day on 8 H100; the plan says it exactly.
#
#   bash runs/miniseries.sh [--dry-run] [--toy] [--gpus N] [--depths "12 14 16"] [--ratio R] [--shards S] [--device-batch-size B] [--name NAME] [--price P]
#
#   --dry-run     print the plan and the commands; do nothing
#   --toy         two depths at toy size on the CPU, with two processes, on the embedded corpus, without downloads
#   --gpus N      GPUs of each machine (default 8)
#   --depths "…"  which models (default "12 14 16 18 20 22 24 26")
#   --ratio R     training tokens per parameter (default 12)
#   --shards S    of the corpus (default: as many as the longest training reads)
#   --device-batch-size B   rows per GPU and micro-step (default: for each depth the most that fits)
#   --name NAME   how the runs are called: NAME_d12 and so on (default mini)
#   --price P     dollars per hour of the whole machine
#
# Restartable: finished models are skipped, an unfinished one goes on from its newest checkpoint. Results are lines of JSON in
# report/results.jsonl, written by the training itself; the last stage draws them.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. runs/_run.sh

depths='12 14 16 18 20 22 24 26' ratio=12 shards='' device_batch_size=0 name=mini
options "depths ratio shards device_batch_size name" "$@"
corpus=climbmix ids=32768 characters=2000000000 shape=() length=(--target-param-data-ratio "$ratio") eval=(--eval-tokens 4194304) bench=(--core full --eval-tokens 10485760 --ngram-tokens 0)
stages="climbmix=${shards:-auto},bundle,tokenizer=2e9,train,core,report"
if [ $toy = 1 ]; then
    gpus=${gpus:-2} depths='1 2' corpus=stdlib ids=512 characters=300000 device_batch_size=4 shape=(--head-dim 32 --aspect-ratio 32 --sequence-len 64 --window-pattern L --total-batch-size 1024)
    length=(--num-iterations 8) eval=(--eval-tokens 512) bench=(--core none --eval-tokens 512 --ngram-tokens 0) stages='corpus,tokenizer=3e5,train,evaluate,report'
fi
gpus=${gpus:-8}
for depth in $depths; do whole depth; done

packages "$gpus"
plan "$gpus" --depth "${depths// /,}" "${length[@]}" --vocab-size "$ids" --device-batch-size "$device_batch_size" ${shape[@]+"${shape[@]}"} --hardware h100 --stages "$stages"

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

if [ $toy = 0 ]; then
    stage bundle "The rest of the corpus, and the CORE bundle"
    run python -m nanochat.dataset climbmix --shards "$shards"
    run python -m nanochat.core_eval
fi

for depth in $depths; do
    tag=${name}_d$depth rows=$(told "rows$depth")
    stage "train$depth" "Depth $depth"
    if trained "$tag"; then [ "$node" != 0 ] || echo "$tag is there"
    else launch nanochat.scripts.base_train --depth "$depth" --corpus "$corpus" --model-tag "$tag" "${length[@]}" --device-batch-size "$rows" --keep 1 "${eval[@]}" ${shape[@]+"${shape[@]}"}; fi
    launch nanochat.scripts.base_eval --model-tag "$tag" --corpus "$corpus" --device-batch-size "$rows" "${bench[@]}"
done

stage report "The series as a table and a figure"
run python -m nanochat.scripts.scaling_laws --miniseries "${name}_"
[ $dry = 1 ] || done_in "Done in"
