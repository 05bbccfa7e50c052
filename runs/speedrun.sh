#!/usr/bin/env bash
# The speedrun: a chat model of GPT-2's quality from nothing, on one machine with 8 H100. If you have edited notebooks, type nbdev_export first.
#
#   bash runs/speedrun.sh [--dry-run] [--toy] [--gpus N] [--depth D] [--ratio R] [--shards S] [--device-batch-size B] [--tag NAME] [--questions LIST] [--precision bf16] [--price P]
#
#   --dry-run     print the plan (model, tokens, steps, FLOPs, hours, dollars, memory) and the commands; do nothing
#   --toy         all of it at toy size on the CPU, with two processes, on the embedded corpus, without downloads: two minutes
#   --gpus N      GPUs of each machine (default 8); with fewer the same model takes longer
#   --depth D     layers (default 24); everything else about the model follows
#   --ratio R     training tokens per parameter (default 8: a little less than optimal, for the shortest way to GPT-2)
#   --shards S    of the corpus, about 100 MB each (default 170)
#   --device-batch-size B   rows per GPU and micro-step (default 16); lower it if memory runs out, the result is the same
#   --tag NAME    name of the runs (default d24)
#   --questions LIST   tasks of the last evaluation (default chatcore: arc-easy,arc-challenge,mmlu,gsm8k,humaneval,spellingbee)
#   --precision P      fp8 (default: pretraining multiplies in fp8 on Ada, Hopper and later GPUs, in bf16 on others) or bf16
#   --price P     dollars per hour of the whole machine, for the plan and the report
#
# Restartable: type it again after Ctrl-C, a crash or a lost machine. Finished stages are recognised and skipped, a download goes on
# where it was, a training from its newest checkpoint (five in a run). Everything is below $NANOCHAT_BASE_DIR (~/.cache/nanochat).
# On several machines: runs/cluster/.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. runs/_run.sh

depth=24 ratio=8 shards=170 device_batch_size=16 tag='' questions=chatcore precision=fp8
options "depth ratio shards device_batch_size tag questions precision" "$@"
whole depth shards device_batch_size
[[ $precision =~ ^(fp8|bf16)$ ]] || die "--precision takes fp8 or bf16, not '$precision'"
tag=${tag:-d$depth}
corpus=climbmix ids=32768 characters=2000000000 fp8=(--fp8) shape=() length=(--target-param-data-ratio "$ratio") eval=(--eval-tokens 4194304)
bench=(--core full --eval-tokens 10485760 --device-batch-size "$device_batch_size" --ngram-tokens 0) chats=(--mixture hub --eval-size 200) marks=(--tasks "$questions" --max-problems 100000)
stages="climbmix=$shards,tasks,bundle,tokenizer=2e9,train,core,sft,chat,report"
if [ $toy = 1 ]; then
    gpus=${gpus:-2} corpus=stdlib ids=512 characters=300000 depth=1 fp8=() device_batch_size=4 shape=(--head-dim 32 --aspect-ratio 32 --sequence-len 64 --window-pattern L --total-batch-size 1024)
    length=(--num-iterations "${NANOCHAT_TOY_STEPS:-30}") eval=(--eval-tokens 512) bench=(--core mini --max-per-task 12 --eval-tokens 512 --device-batch-size 2 --ngram-tokens 20000)
    chats=(--mixture offline --spelling-bee 0 --simple-spelling 40 --arithmetic 40 --arithmetic-stories 0 --pydoc 0 --pydoc-name 0 --pydoc-pick 0 --identity 1 --num-iterations 4 --eval-size 2)
    marks=(--tasks simplespelling,arithmetic --max-problems 4 --max-new-tokens 8) stages='corpus,tokenizer=3e5,train,evaluate,sft=20000,chat=500,report'
    [ "$tag" != d24 ] || tag=d1
fi
gpus=${gpus:-8}
[ "$precision" = fp8 ] || fp8=()

packages "$gpus"
plan "$gpus" --depth "$depth" "${length[@]}" --vocab-size "$ids" --device-batch-size "$device_batch_size" ${shape[@]+"${shape[@]}"} --hardware h100 --stages "$stages" ${fp8[@]+"${fp8[@]}"}
fp8=$(told fp8)
if [ $dry = 0 ] && [ $toy = 0 ] && [[ ,$questions, =~ ,(chatcore|humaneval), ]] && ! python -c 'from nanochat.execution import execute_code; execute_code("pass")' 2>/dev/null; then
    die "this machine cannot isolate the programs that the model writes for HumanEval; leave it out, type: bash runs/speedrun.sh --questions arc-easy,arc-challenge,mmlu,gsm8k,spellingbee"
fi

if [ $toy = 1 ]; then
    stage corpus "Corpus: a part of the standard library"
    run python -m nanochat.dataset stdlib --max-bytes 2000000
else
    stage climbmix "Corpus: 8 shards now, $shards in the background while the tokenizer trains"
    run python -m nanochat.dataset climbmix --shards $((shards < 8 ? shards : 8))
    run python -m nanochat.dataset climbmix --shards "$shards" --background
    stage tasks "Questions and conversations for the later stages"
    run python -m nanochat.tasks.common all
fi

stage tokenizer "Tokenizer: $ids byte pairs from $characters characters"
tokenizer "$corpus" "$ids" "$characters"

if [ $toy = 0 ]; then
    stage bundle "The rest of the corpus, and the CORE bundle"
    run python -m nanochat.dataset climbmix --shards "$shards"
    run python -m nanochat.core_eval
fi

stage train "Pretraining: a model of $depth layers predicts the next token"
# shellcheck disable=SC2086
launch nanochat.scripts.base_train --depth "$depth" --corpus "$corpus" --model-tag "$tag" "${length[@]}" --device-batch-size "$device_batch_size" "${eval[@]}" ${shape[@]+"${shape[@]}"} $fp8

stage "$([ $toy = 1 ] && echo evaluate || echo core)" "Evaluation: bits per byte and CORE"
launch nanochat.scripts.base_eval --model-tag "$tag" --corpus "$corpus" "${bench[@]}"

stage sft "Fine-tuning on conversations"
launch nanochat.scripts.chat_sft --model-tag "$tag" "${chats[@]}"

stage chat "Questions: ARC, MMLU, GSM8K, HumanEval, spelling"
launch nanochat.scripts.chat_eval --source sft --model-tag "$tag" "${marks[@]}"

stage report "Report"
price=${price:-$(told price)}
run python -m nanochat.scripts.report ${price:+--price-per-hour "$price"}
[ $dry = 1 ] || done_in "Done in"
chats sft
