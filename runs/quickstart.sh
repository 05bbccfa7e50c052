#!/usr/bin/env bash
# From nothing to chatting with a model you trained yourself: about ten minutes on two CPU cores, installation included.
#
#   bash runs/quickstart.sh [--minutes N] [--depth D] [--no-chat] [--fresh]
#
#   --minutes N   time for pretraining, fine-tuning and reinforcement learning together (default 7)
#   --depth D     layers of the model; width and everything else follow from it (default 4)
#   --no-chat     stop after the report
#   --fresh       train again what is already there; needed with other --minutes
#
# Restartable: type it again after Ctrl-C or a crash. Finished stages are recognised and skipped, an unfinished
# training run goes on from its last checkpoint. Everything is written below $NANOCHAT_BASE_DIR (~/.cache/nanochat).
# (Where there is a C compiler, the step that writes answers is compiled once, into ~/.cache/nanochat-native.)
# The network is used for the package index only: the corpus is Python's own standard library, about 30 MB of text.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. runs/_env.sh
started=$SECONDS

minutes=7 depth=4 chat=1 fresh=()
while [ $# -gt 0 ]; do
    case $1 in
        --minutes|--depth) [ $# -gt 1 ] || die "$1 needs a number, for instance: bash runs/quickstart.sh $1 6"
                           [[ $2 =~ ^[0-9]+([.][0-9]+)?$ ]] || die "$1 takes a number, not '$2'; try: bash runs/quickstart.sh $1 6"
                           declare "${1#--}=$2"; shift 2 ;;
        --no-chat) chat=0; shift ;;
        --fresh) fresh=(--fresh); shift ;;
        -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) die "unknown flag $1; there are --minutes N, --depth D, --no-chat and --fresh" ;;
    esac
done
[[ $depth =~ ^[1-9][0-9]*$ ]] || die "--depth takes a whole number from 1, not $depth"
tag=d$depth  # the name of this model's runs in every stage
share() { awk -v m="$minutes" -v f="$1" 'BEGIN { printf "%.2f", m * f }'; }
stage() { say "[$((SECONDS - started))s] $1"; }

trap 'printf "\nstopped; type the same command to go on from here\n" >&2; exit 130' INT

install serve
export GRADIO_ANALYTICS_ENABLED=False HF_HUB_OFFLINE=1

stage "1/8  Corpus: the standard library as text (30 MB, 5 s)"
python -m nanochat.dataset stdlib

stage "2/8  Tokenizer: 4,096 byte pairs (10 s)"
python -m nanochat.scripts.tok_train --vocab-size 4096
python -m nanochat.scripts.tok_eval

stage "3/8  Pretraining: predict the next token ($(share .39) min)"
python -m nanochat.scripts.base_train --preset tiny-cpu --depth "$depth" --minutes "$(share .39)" ${fresh[@]+"${fresh[@]}"}

stage "4/8  Evaluation: bits per byte beside a 5-gram model, samples (20 s)"
python -m nanochat.scripts.base_eval --model-tag "$tag"

stage "5/8  Fine-tuning on chat: spelling, counting, arithmetic, questions about Python ($(share .33) min)"
python -m nanochat.scripts.chat_sft --model-tag "$tag" --minutes "$(share .33)" ${fresh[@]+"${fresh[@]}"}
python -m nanochat.scripts.chat_eval --source sft --model-tag "$tag"

stage "6/8  Reinforcement learning on stories with sums, which fine-tuning left unfinished ($(share .28) min)"
# Little stories are what fine-tuning saw too few of.
python -m nanochat.scripts.chat_rl --model-tag "$tag" --minutes "$(share .28)" --eval-problems 300 ${fresh[@]+"${fresh[@]}"}

stage "7/8  Evaluation on held-out items"
python -m nanochat.scripts.chat_eval --source rl --model-tag "$tag"

stage "8/8  Report"
python -m nanochat.scripts.report
say "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s."

if [ $chat = 1 ]; then
    say "Chat: open the address below in a browser; Ctrl-C ends it. In the terminal: . .venv/bin/activate && python -m nanochat.scripts.chat_cli --source rl"
    exec python -m nanochat.scripts.chat_web --source rl --model-tag "$tag"
fi
