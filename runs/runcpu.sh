#!/usr/bin/env bash
# A longer run on a laptop: the quickstart's road with a deeper model and hours instead of minutes, on the CPU (NANOCHAT_DEVICE=mps: on Apple's GPU).
#
#   bash runs/runcpu.sh [--dry-run] [--toy] [--hours H] [--depth D] [--corpus NAME] [--tag NAME]
#
#   --dry-run     print the plan and the commands; do nothing
#   --toy         all of it at toy size: half a minute
#   --hours H     for pretraining, fine-tuning and reinforcement learning together (default 2); another number needs another --tag
#   --depth D     layers (default 6)
#   --corpus NAME stdlib (default: embedded, nothing is downloaded), a folder of your own texts, or one of the hub: climbmix, fineweb-edu (8 shards, 800 MB)
#   --tag NAME    name of the runs (default d6)
#
# Restartable: type it again after Ctrl-C or a crash. Keep the laptop plugged in, and its lid open.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. runs/_run.sh

hours=2 depth=6 corpus=stdlib tag=''
options "hours depth corpus tag" "$@"
whole depth
[[ $hours =~ ^[0-9]+([.][0-9]+)?$ ]] || die "--hours takes a number, not '$hours'; try: bash runs/runcpu.sh --hours 1"
tag=${tag:-d$depth} gpus=1 ids=8192 prepare=(python -m nanochat.dataset "$corpus")
cores=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())' 2>/dev/null || echo 2)
export NANOCHAT_DEVICE=${NANOCHAT_DEVICE:-cpu} OMP_NUM_THREADS=$([ $toy = 1 ] && echo 1 || echo "$cores")
minutes() { awk -v h="$hours" -v f="$1" 'BEGIN { printf "%.2f", 60 * h * f }'; }

# Most of the time goes into reading; the rest in two thirds and one third.
pre=(--preset laptop --minutes "$(minutes .64)") sft=(--minutes "$(minutes .24)") rl=(--minutes "$(minutes .12)" --eval-problems 300) marks=() bench=() source=corpus
planned=(--minutes "$(minutes .64)" --sequence-len 512 --window-pattern L --device-batch-size 16)
case $corpus in climbmix|fineweb-edu)
    # After a corpus of the hub chat_sft would want the hub's conversations, which nothing here fetches; so the offline mixture is spelled out,
    # with what a model of web text may say about itself.
    source=$corpus=8 prepare+=(--shards 8) sft+=(--mixture 'spellingbee, simplespelling, arithmetic, arithmetic3, pydoc, pydoc-pick, pydoc-qa, identity-hub*2') ;;
esac
stages="$source,tokenizer=2e8,train,evaluate,sft_minutes=$(minutes .24),chat=120000,rl_minutes=$(minutes .12),report"
if [ $toy = 1 ]; then
    ids=512 depth=1 corpus=stdlib source=corpus prepare=(python -m nanochat.dataset stdlib --max-bytes 2000000)
    [ "$tag" != d6 ] || tag=cpu_d1
    shape=(--num-iterations "${NANOCHAT_TOY_STEPS:-20}" --head-dim 32 --aspect-ratio 32 --sequence-len 128 --window-pattern L --device-batch-size 4 --total-batch-size 1024)
    planned=("${shape[@]}") pre=(--eval-tokens 512 "${shape[@]}") bench=(--core none --eval-tokens 512 --device-batch-size 2 --ngram-tokens 20000)
    sft=(--spelling-bee 0 --simple-spelling 40 --arithmetic 40 --arithmetic-stories 0 --pydoc 0 --pydoc-name 0 --pydoc-pick 0 --identity 1 --num-iterations 4 --eval-size 2)
    rl=(--task arithmetic --num-iterations 1 --examples-per-step 2 --num-samples 2 --eval-problems 2 --eval-samples 2 --max-new-tokens 8 --device-batch-size 4)
    marks=(--tasks simplespelling,arithmetic --max-problems 4 --max-new-tokens 8) stages='corpus,tokenizer=3e5,train,evaluate,sft=20000,chat=500,report'
fi
characters=$([ $toy = 1 ] && echo 300000 || echo 200000000)

packages 0
plan 1 --depth "$depth" --vocab-size "$ids" "${planned[@]}" --stages "$stages"

stage "${source%=8}" "Corpus: $corpus"
run "${prepare[@]}"

stage tokenizer "Tokenizer: $ids byte pairs"
tokenizer "$corpus" "$ids" "$characters"

stage train "Pretraining: predict the next token"
run python -m nanochat.scripts.base_train --depth "$depth" --corpus "$corpus" --model-tag "$tag" "${pre[@]}"

stage evaluate "Evaluation: bits per byte beside a 5-gram model, samples"
run python -m nanochat.scripts.base_eval --model-tag "$tag" --corpus "$corpus" ${bench[@]+"${bench[@]}"}

stage "$([ $toy = 1 ] && echo sft || echo sft_minutes)" "Fine-tuning on chat"
run python -m nanochat.scripts.chat_sft --model-tag "$tag" "${sft[@]}"

stage chat "Questions for the fine-tuned model"
run python -m nanochat.scripts.chat_eval --source sft --model-tag "$tag" ${marks[@]+"${marks[@]}"}

stage rl_minutes "Reinforcement learning on sums"
run python -m nanochat.scripts.chat_rl --model-tag "$tag" "${rl[@]}"
run python -m nanochat.scripts.chat_eval --source rl --model-tag "$tag" ${marks[@]+"${marks[@]}"}

stage report "Report"
run python -m nanochat.scripts.report
[ $dry = 1 ] || done_in "Done in"
chats rl
