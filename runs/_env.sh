# Sourced by the other scripts: finds Python, makes the virtual environment once, installs an extra of this project.
# NANOCHAT_VENV names another folder for the environment; PYTHON another interpreter.

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
    local p
    for p in ${PYTHON:-} python3 python3.12 python3.11 python3.13 python; do
        if command -v "$p" >/dev/null && "$p" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$p"; return
        fi
    done
    die "this needs Python 3.11 or later with the venv module; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# NANOCHAT_SKIP_INSTALL=1 uses the Python on the PATH as it is.

# install EXTRA: a virtual environment with the package and that extra. Skipped when nothing that decides it has changed.
install() {
    [ "${NANOCHAT_SKIP_INSTALL:-0}" = 1 ] && return
    local extra=$1 venv=${NANOCHAT_VENV:-$ROOT/.venv} python stamp want
    python=$(find_python) || exit 2
    # An existing environment stays on the interpreter it was made with.
    [ -x "$venv/bin/python" ] && python="$venv/bin/python"
    stamp="$venv/.nanochat-$extra"
    want=$(cat "$ROOT/pyproject.toml" <("$python" -VV) <(printf %s "$ROOT") | cksum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
        say "Installing nanochat[$extra] into ${venv/#$ROOT\//} (about a minute and 2 GB the first time)"
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
        # shellcheck disable=SC1091
        . "$venv/bin/activate"
        # --no-compile: Python compiles what it imports, not all that is there.
        # The newest plain build is several GB of CUDA libraries; without a GPU this pinned one is what CI tests.
        command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1 || pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
        pip install --quiet --no-compile --disable-pip-version-check -e "$ROOT[$extra]"
        printf %s "$want" >"$stamp"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
