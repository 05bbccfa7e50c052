#!/usr/bin/env bash
# Everything that must hold before a commit: notebooks and package agree, every notebook runs, every test passes.
# Ten to fifteen minutes on two cores, without the installation. Arguments go to pytest: bash runs/test.sh -k tokenizer
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. runs/_env.sh
install dev

# Nothing here may read or change what you have trained.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export NANOCHAT_BASE_DIR="$scratch/base" GRADIO_ANALYTICS_ENABLED=False HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1  # two workers on two cores
export MPLBACKEND=Agg

say "1/3  Notebooks and package agree"
python dev/check_export.py

say "2/3  Every notebook of nbs/ runs"
nbdev_test --n_workers 2 --do_print

say "3/3  Tests, in two processes"
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
