#!/usr/bin/env bash
# A run script on several machines. Type this on every one of them, with another --rank each, the first (rank 0) included:
#
#   bash runs/cluster/torchrun.sh --nodes 2 --rank 0 --head 10.0.0.1 [--port 29500] [--gpus 8] runs/speedrun.sh [its flags]
#
#   --nodes N     how many machines
#   --rank R      which one this is, from 0
#   --head HOST   name or address of the first machine, as the others reach it
#   --port P      the trainings of the script meet there at P + 1, P + 2 and so on (default 29500): open these between the machines
#   --gpus N      GPUs of each machine (default 8; 2 processes with --toy)
#
# All machines need this folder with its packages, and the same $NANOCHAT_BASE_DIR on a disk that they share. The order in which they
# start does not matter: whoever is early waits. Restartable like the script itself: type the same on every machine again.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
cd "$ROOT"
. runs/_env.sh

nodes='' rank='' head='' port=29500 gpus=''
while [ $# -gt 0 ]; do
    case $1 in
        --nodes|--rank|--head|--port|--gpus) [ $# -gt 1 ] || die "$1 needs a value; type: bash runs/cluster/torchrun.sh --help"
                                             declare "${1#--}=$2"; shift 2 ;;
        -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        -*) die "unknown flag $1; flags of the run script come after its name" ;;
        *) break ;;
    esac
done
for name in nodes rank head; do [ -n "${!name}" ] || die "--$name is missing; type: bash runs/cluster/torchrun.sh --help"; done
for name in nodes rank port; do [[ ${!name} =~ ^[0-9]+$ ]] || die "--$name takes a whole number, not '${!name}'"; done
[ "$rank" -lt "$nodes" ] || die "--rank $rank is not one of $nodes machines; they count from 0 to $((nodes - 1))"
[ $# -gt 0 ] && [ -f "$1" ] || die "name the script to run, for instance runs/speedrun.sh"
script=$1; shift

export NNODES=$nodes NODE_RANK=$rank HEAD_ADDR=$head HEAD_PORT=$port
exec bash "$script" ${gpus:+--gpus "$gpus"} "$@"
