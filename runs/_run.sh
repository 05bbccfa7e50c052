# Sourced by speedrun.sh, miniseries.sh, scaling_laws.sh and runcpu.sh: flags, the plan, stages, and processes on one machine or several.
#
# On several machines every one of them runs the same script, with NNODES, NODE_RANK, HEAD_ADDR and HEAD_PORT set (runs/cluster/ does
# that). Only the first machine does what needs one process; the others wait for its next training to open its port. They must see
# the same NANOCHAT_BASE_DIR, because checkpoints are written by all of them.
. runs/_env.sh

started=$SECONDS
script=$(basename "$0" .sh)
dry=0 toy=0 gpus='' price='' entered='' stages_done=0 launches=0
nodes=${NNODES:-1} node=${NODE_RANK:-0} head=${HEAD_ADDR:-127.0.0.1} port=${HEAD_PORT:-29500}

help() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0; }

# options "name name ..." "$@": --dry-run, --toy, --gpus N, --price P, and the named ones; --some-name VALUE sets some_name.
options() {
    # printf -v, because the bash of macOS has no declare -g; the locals must not be called like a flag.
    local _known=" gpus price $1 " _name; shift
    while [ $# -gt 0 ]; do
        _name=${1#--}; _name=${_name//-/_}
        case $1 in
            --dry-run) dry=1; shift; continue ;;
            --toy) toy=1; shift; continue ;;
            -h|--help) help ;;
        esac
        case "$_known" in
            *" $_name "*) [ $# -gt 1 ] || die "$1 needs a value; type: bash runs/$script.sh --help"
                          printf -v "$_name" %s "$2"; shift 2 ;;
            *) die "unknown flag $1; there are --dry-run, --toy, and with a value:$(printf ' --%s' ${_known//_/-})" ;;
        esac
    done
    [[ $gpus =~ ^([1-9][0-9]*)?$ ]] || die "--gpus takes a whole number from 1, not '$gpus'"
    [[ $price =~ ^([0-9]+([.][0-9]+)?)?$ ]] || die "--price takes dollars per hour, not '$price'"
    if [ $toy = 1 ]; then
        # A toy never touches your own runs, and never a GPU.
        export NANOCHAT_DEVICE=cpu NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat-toy} HF_HUB_OFFLINE=1
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    base=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
}

# whole NAME...: each of these variables is a whole number from 1.
whole() {
    local name
    for name in "$@"; do [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "--${name//_/-} takes a whole number from 1, not '${!name}'"; done
}

# Packages: those on the PATH if they are there, else a virtual environment of this project.
packages() {
    local probe='import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in ("torch", "tyro", "pyarrow", "tiktoken", "rustbpe", "safetensors")))'
    python -c "$probe" 2>/dev/null && return
    local venv=${NANOCHAT_VENV:-$ROOT/.venv} found
    entered=". $(printf %q "${venv/#$ROOT\//}")/bin/activate && "
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$probe"; then
        # shellcheck disable=SC1091
        . "$venv/bin/activate"; return
    fi
    [ $dry = 0 ] && [ "${NANOCHAT_SKIP_INSTALL:-0}" = 0 ] || die "the packages are not installed; type: pip install -e '.[train]'"
    found=$(find_python) || exit 2
    # What needs no packages is checked before they are fetched.
    [ $toy = 1 ] || "$found" -m nanochat.scripts.doctor --need-gpus "$1" --need-disk-gb 12 >/dev/null || exit 2
    install train
}

# plan PROCESSES FLAGS...: print what the run will take; unless it is only to be printed, stop here if something lacks.
plan() {
    procs=$1; shift
    told=$(mktemp)
    trap 'rm -f "$told"' EXIT
    trap 'printf "\nstopped; type the same command to go on from here\n" >&2; exit 130' INT
    local flags=(--script "$script" --gpus "$procs" --nodes "$nodes" --out "$told")
    [ $dry = 1 ] || flags+=(--check)
    [ -z "$price" ] || flags+=(--price "$price")
    # On Apple's GPU too the plan is the CPU's: it has the same memory, and no NVIDIA card is wanted.
    case ${NANOCHAT_DEVICE:-} in cpu|mps) flags+=(--device cpu) ;; esac
    if [ "$node" = 0 ]; then python -m nanochat.scripts.doctor plan "${flags[@]}" "$@" || exit $?
    else python -m nanochat.scripts.doctor plan "${flags[@]}" "$@" >/dev/null || exit $?; fi
}

# told KEY: what the plan says about a stage, or a number it has worked out.
told() { awk -F'\t' -v key="$1" '$1 == key { print $2; exit }' "$told"; }

# stage KEY "what happens": the heading of a stage, with the plan's minutes, bytes and dollars.
stage() {
    stages_done=$((stages_done + 1))
    [ "$node" = 0 ] || return 0
    local words; words=$(told "$1")
    say "$([ $dry = 1 ] || echo "[$((SECONDS - started))s] ")$stages_done  $2${words:+  ($words)}"
}

show() { printf '  '; printf '%q ' "$@"; printf '\n'; }

# run COMMAND: one process, on the first machine only.
run() {
    [ "$node" = 0 ] || return 0
    if [ $dry = 1 ]; then show "$@"; else "$@"; fi
}

# launch MODULE FLAGS...: a process for every GPU of every machine.
launch() {
    local module=$1 command; shift
    launches=$((launches + 1))
    if [ "$nodes" -gt 1 ]; then
        # A port for each launch: a machine that is early cannot join the one before.
        local at=$((port + launches)) host=$([ "$node" = 0 ] && echo 1 || echo 0)
        command=(torchrun --nnodes="$nodes" --nproc-per-node="$procs" --rdzv-id="nanochat-$at" --rdzv-backend=c10d
                 --rdzv-endpoint="$head:$at" --rdzv-conf="is_host=$host,join_timeout=1800" -m "$module" -- "$@")
    elif [ "$procs" -gt 1 ]; then command=(torchrun --standalone --nproc-per-node="$procs" -m "$module" -- "$@")
    else command=(python -m "$module" "$@"); fi
    if [ $dry = 1 ]; then [ "$node" != 0 ] || show "${command[@]}"; return 0; fi
    [ "$nodes" = 1 ] || meet "$at"
    "${command[@]}"
}

# meet PORT: the first machine leaves a note where all must see it; the others wait until its port is open, then look for the note.
meet() {
    local note="$base/.nodes/$head-$port" end=$((SECONDS + 60 * ${NANOCHAT_WAIT_MINUTES:-240}))
    if [ "$node" = 0 ]; then mkdir -p "$base/.nodes" && date >"$note"; return; fi
    until (exec 3<>"/dev/tcp/$head/$1") 2>/dev/null; do
        [ $SECONDS -lt $end ] || die "machine $node waited ${NANOCHAT_WAIT_MINUTES:-240} minutes for $head:$1; look at the first machine's log, and whether that port is open between them"
        sleep 1
    done
    [ -f "$note" ] || die "machine $node does not see what the first one writes; set NANOCHAT_BASE_DIR to a folder that all machines share"
}

# tokenizer CORPUS IDS CHARACTERS: train one, unless one of that size from that corpus is there (later shards must not change it).
tokenizer() {
    local record="$base/tokenizer/tok_train.json"
    if [ $dry = 0 ] && [ -f "$record" ] && grep -q "\"corpus\": \"$1\"" "$record" && grep -q "\"vocab_size\": $2," "$record"; then
        [ "$node" != 0 ] || echo "a tokenizer of $2 ids from $1 is there"
        return 0
    fi
    run python -m nanochat.scripts.tok_train --corpus "$1" --vocab-size "$2" --max-chars "$3"
    run python -m nanochat.scripts.tok_eval --corpus "$1"
}

# trained TAG: whether this training is complete. (Remove its folder below base_checkpoints to train it again.)
trained() { [ $dry = 0 ] && [ -f "$base/base_checkpoints/$1/result.json" ]; }

done_in() { [ "$node" != 0 ] || say "$1 $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. The plan said: $(told all)."; }

# chats SOURCE: how to talk to the model of $tag, with this script's environment and the chat's packages where a new shell would be without them.
chats() {
    local model="--source $1 --model-tag $tag" serve=''
    [ "$node" = 0 ] || return 0
    python -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("fastapi", "gradio"))))' || serve="pip install -e '.[serve]' && "
    say "Chat in a browser: $entered${serve}python -m nanochat.scripts.chat_web $model    In the terminal: ${entered}python -m nanochat.scripts.chat_cli $model"
}
