#!/bin/sh
# Makes .venv with the pinned requirements and this package; does nothing when they are installed already.
#
#   tools/setup_env.sh [--dev]         --dev adds the test and lint tools
#   tools/setup_env.sh --find-python   prints the Python that would be used, and stops
#
# PYTHON=/path/to/python3.12 picks the interpreter, VENV=DIR another place than .venv.
# Exit code 2: no Python fits. Exit code 1: an install failed; running again continues it.
set -u
cd "$(dirname "$0")/.." || exit 1
VENV=${VENV:-.venv}
TRIED=

# A Python fits when megatron-core and torch have wheels for it and `venv` can make an environment.
# -I keeps PYTHONPATH and the current directory out. Prints nothing if it fits, else the reason.
probe() {
    "$1" -I - <<'PROBE' 2>/dev/null || echo "does not run"
import sys, sysconfig
version = "is Python %d.%d.%d" % sys.version_info[:3]
if not (3, 12) <= sys.version_info[:2] < (3, 14) or sys.implementation.name != "cpython":
    print(version)
elif sysconfig.get_config_var("Py_GIL_DISABLED"):
    print(version + ", free-threaded")
else:
    try:
        import ctypes, ensurepip, ssl, venv
    except ImportError as error:
        print(version + ", but without its module " + error.name)
PROBE
}

# Sets FOUND and returns 0 if the candidate fits; else notes in TRIED why it does not.
fits() {
    command -v "$1" >/dev/null 2>&1 || return 1
    reason=$(probe "$1")
    if [ -z "$reason" ]; then
        FOUND=$(command -v "$1")
        return 0
    fi
    TRIED="$TRIED${TRIED:+; }$1 $reason"
    return 1
}

# A shim of pyenv may be on the PATH and still fail, so every candidate is run.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" && return 0
        [ -n "$TRIED" ] || TRIED="$PYTHON is not there"
        TRIED="PYTHON=$PYTHON was given, but $TRIED"
        return 1
    fi
    for name in python3.12 python3.13 python3 python; do
        fits "$name" && return 0
    done
    home=${HOME:-/nonexistent}
    for path in "${PYENV_ROOT:-$home/.pyenv}"/versions/3.1[23]*/bin/python \
        "$home"/.local/bin/python3.1[23] "$home"/.local/share/uv/python/*/bin/python3.1[23] \
        /usr/local/bin/python3.1[23] /opt/*/bin/python3.1[23] /opt/homebrew/bin/python3.1[23] \
        "$home"/miniconda3/bin/python "$home"/miniforge3/bin/python; do
        fits "$path" && return 0
    done
    uv_python=$(uv python find ">=3.12,<3.14" 2>/dev/null) && fits "$uv_python" && return 0
    return 1
}

no_python() {
    echo "No Python that fits was found. This project needs CPython 3.12 or 3.13 with the venv" \
        "module (the releases that megatron-core 0.19.2 has wheels for). Looked at:" \
        "${TRIED:-nothing is called python here}. Install one, for example with 'apt-get install" \
        "python3.12 python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12', or name" \
        "one with 'PYTHON=/path/to/python3.12 make setup'." >&2
    exit 2
}

make_venv() {
    # pip comes last when an environment is made: if it runs, the environment is whole.
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        [ -z "$(probe "$VENV/bin/python")" ] && return 0
    fi
    find_python || no_python
    echo "setup: $VENV from $FOUND"
    "$FOUND" -I -m venv --clear "$VENV" && return 0
    echo "setup: '$FOUND -m venv $VENV' failed; its message is above." >&2
    exit 1
}

# Everything is pinned, so nothing is resolved (--no-deps). Byte-compiling all 40,000 files would
# take longer than the first imports lose without it (--no-compile). Called in the background, where
# exec makes pip itself the process that an interrupt ends.
pip_install() {
    log=$1
    shift
    exec "$VENV/bin/python" -m pip install --no-deps --no-compile --no-input --progress-bar off \
        --disable-pip-version-check "$@" >"$log" 2>&1
}

# install NAME FILE: skipped when the same FILE was installed to the end before. The CUDA libraries
# are half of the work, so a second pip unpacks them at the same time.
install() {
    stamp="$VENV/.installed-$1"
    sum=$(cksum <"$2")
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && return 0
    rm -f "$stamp"
    echo "setup: installing $(grep -c '==' "$2") packages from $2"
    grep '==' "$2" | grep -E '^(nvidia|cuda|triton)' >"$VENV/cuda.txt"
    grep '==' "$2" | grep -v -E '^(nvidia|cuda|triton)' >"$VENV/other.txt"
    began=$(date +%s)
    trap 'kill $pids 2>/dev/null; echo "setup: interrupted; run it again to continue" >&2; exit 130' \
        INT TERM HUP
    pip_install "$VENV/pip-other.log" -r "$VENV/other.txt" &
    pids=$!
    cuda_pid=
    if [ -s "$VENV/cuda.txt" ]; then
        pip_install "$VENV/pip-cuda.log" -r "$VENV/cuda.txt" &
        cuda_pid=$!
        pids="$pids $cuda_pid"
    fi
    show_progress $pids
    failed=
    wait "${pids%% *}" || failed="$VENV/pip-other.log"
    [ -z "$cuda_pid" ] || wait "$cuda_pid" || failed="$VENV/pip-cuda.log"
    trap - INT TERM HUP
    [ -z "$failed" ] || install_failed "$failed"
    "$VENV/bin/python" -m pip check >"$VENV/pip-check.log" 2>&1 || install_failed "$VENV/pip-check.log"
    echo "$sum" >"$stamp"
    echo "setup: $2 installed in $(($(date +%s) - began)) s"
}

# The package itself, editable: programs find it from any working directory. Its build backend, setuptools, is among
# the requirements, so nothing is downloaded. Done again when pyproject.toml or the folder's place has changed.
install_package() {
    stamp="$VENV/.installed-package"
    sum="$(cksum <pyproject.toml) $PWD"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && return 0
    rm -f "$stamp"
    (pip_install "$VENV/pip-package.log" --no-build-isolation -e .) || install_failed "$VENV/pip-package.log"
    echo "$sum" >"$stamp"
    echo "setup: this package installed from $PWD"
}

# One line every 15 s while the given one or two processes run, so that a slow download is seen to move.
show_progress() {
    ticks=0
    while kill -0 "$1" 2>/dev/null || kill -0 "${2:-$1}" 2>/dev/null; do
        sleep 1
        ticks=$((ticks + 1))
        [ $((ticks % 15)) -eq 0 ] || continue
        echo "setup:   $ticks s, $(du -sm "$VENV" 2>/dev/null | cut -f1) MB on disk," \
            "$(grep -v WARNING "$VENV/pip-other.log" | tail -n 1 | cut -c 1-60)"
    done
}

install_failed() {
    tail -n 15 "$1" >&2
    echo "setup: an install failed; the end of $1 is above. What was installed is kept: once the" \
        "cause is fixed (network, disk space: 6 GB), the same command continues from there." >&2
    exit 1
}

case "${1:-}" in
--find-python)
    find_python || no_python
    echo "$FOUND"
    exit 0
    ;;
--dev | "") ;;
*)
    echo "setup_env.sh: unknown argument '$1'; it takes --dev or --find-python." >&2
    exit 2
    ;;
esac
make_venv
install runtime requirements.txt
install_package
[ "${1:-}" != --dev ] || install dev requirements-dev.txt
