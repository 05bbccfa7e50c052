#!/usr/bin/env bash
# The course in JupyterLab: opens lesson 0 in your browser, with the kernel of this project's environment.
#
#   bash runs/lab.sh [ARGUMENTS OF JUPYTER LAB]
#
# For instance --no-browser --port 9999 on a machine that you reach from elsewhere. Ctrl-C twice ends it.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. runs/_env.sh
case ${1:-} in -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac

install course
# A kernel named python3 in the user's own folder would win over the environment's, and would not know nanochat.
export JUPYTER_PREFER_ENV_PATH=1 GRADIO_ANALYTICS_ENABLED=False HF_HUB_OFFLINE=1
# No question about news and no request to the network: the extension that asks is off, for this start only.
export JUPYTER_CONFIG_PATH="$ROOT/runs/jupyter${JUPYTER_CONFIG_PATH:+:$JUPYTER_CONFIG_PATH}"
say "Opening lesson 0; Ctrl-C twice ends JupyterLab"
# Without the root, JupyterLab would show lessons/ only, and links into nbs/ would lead nowhere.
exec jupyter lab --ServerApp.root_dir="$ROOT" "$@" lessons/00_start_here.ipynb
