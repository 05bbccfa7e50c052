#!/usr/bin/env bash
# The speedrun, or another run script, as a SLURM job on several nodes:
#
#   sbatch --nodes=2 runs/cluster/slurm.sh                          # runs/speedrun.sh on two nodes with 8 GPUs each
#   sbatch --nodes=4 runs/cluster/slurm.sh runs/miniseries.sh --ratio 10
#
# What your cluster wants besides (--partition, --account, --qos) goes before the script's name or into lines below. Set
# NANOCHAT_BASE_DIR to a folder on the shared file system before you submit, and install the packages once on the login node.
# Two nodes take about half of the plan's hours, if the network between them is fast; see the plan first: runs/speedrun.sh --dry-run.
# Restartable: when the time is up or a node is lost, submit the same again. SLURM's --requeue does that by itself.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --output=nanochat-%j.log
set -euo pipefail
# SLURM runs a copy of this file from another place: the project is where sbatch was typed.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
[ -f runs/cluster/torchrun.sh ] || { echo "error: type sbatch in the project's folder, the one that holds runs/" >&2; exit 2; }
: "${SLURM_JOB_NODELIST:?type: sbatch runs/cluster/slurm.sh}"

[ $# -gt 0 ] || set -- runs/speedrun.sh
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}  # the first of them
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs that share a node do not meet
gpus=${SLURM_GPUS_ON_NODE:-}

# One task per node; each knows its number as SLURM_NODEID. If one fails the others are stopped.
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --label \
    bash -c 'nodes=$1 head=$2 port=$3 gpus=$4; shift 4; exec bash runs/cluster/torchrun.sh --nodes "$nodes" --rank "$SLURM_NODEID" --head "$head" --port "$port" ${gpus:+--gpus "$gpus"} "$@"' \
    nanochat "$SLURM_JOB_NUM_NODES" "$head" "$port" "$gpus" "$@"
