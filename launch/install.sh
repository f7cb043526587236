#!/usr/bin/env bash
# Install rlmono and everything it needs, pinned, into .venv: ./launch/install.sh [cpu|gpu|test]
#
#   cpu     (default, unless the other is installed) torch first, then what sglang and megatron-core need without a GPU
#   gpu     sglang as a whole, with its CUDA builds
#   test    what launch/test.sh needs besides; after one of the others
#
# What is installed already is left alone. Variables:
#   RLMONO_VENV         the folder of the virtual environment (default .venv)
#   RLMONO_PYTHON       the Python to make it with, 3.11 or 3.12 (default: the first found)
#   RLMONO_TORCH_INDEX  package index for torch alone, where its CPU builds are (default: pip's own settings; the
#                       Linux build of the public index carries CUDA, gigabytes that a CPU never uses)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

good_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }

find_python() {
    local python
    for python in ${RLMONO_PYTHON:-python3 python3.12 python3.11}; do
        if good_python "$python"; then command -v "$python"; return; fi
    done
    [ -z "${RLMONO_PYTHON:-}" ] || die "RLMONO_PYTHON=$RLMONO_PYTHON is not a Python 3.11 or 3.12"
    die "no Python 3.11 or 3.12 found (python3 is $(python3 -V 2>&1)); install one, or name it: RLMONO_PYTHON=/path/to/python3.12 $0"
}

make_venv() {
    local python
    if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        good_python "$VENV/bin/python" || die "$VENV has $("$VENV/bin/python" -V 2>&1), not 3.11 or 3.12; remove it, or set RLMONO_VENV to another folder"
        return
    fi
    python=$(find_python)
    echo "install: a virtual environment in $VENV, with $("$python" -V 2>&1)"
    "$python" -m venv "$VENV" >"$LOG" 2>&1 || { tail -n 20 "$LOG" >&2; die "$python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; }
}

install() {     # WHAT PIP-ARGUMENTS
    local what=$1 began=$SECONDS
    shift
    echo "install: $what …"
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check "$@" >"$LOG" 2>&1; then
        grep -v '^WARNING' "$LOG" | tail -n 8 >&2
        die "pip could not install $what; all it said is in $LOG. Is there a network? Without one, give pip a folder of wheels (PIP_NO_INDEX=1 PIP_FIND_LINKS=/path)"
    fi
    echo "install: $what, done in $((SECONDS - began)) s"
}

install_cpu() {
    local index=()
    [ -z "${RLMONO_TORCH_INDEX:-}" ] || index=(--index-url "$RLMONO_TORCH_INDEX")
    install "$(grep '^torch' "$PINS-torch.txt")${RLMONO_TORCH_INDEX:+ from RLMONO_TORCH_INDEX}" "${index[@]}" -r "$PINS-torch.txt"
    install "$(grep -c '==' "$PINS-cpu.txt") packages" --only-binary :all: -r "$PINS-cpu.txt"
    install "sglang, megatron-core" --only-binary :all: --no-deps -r "$PINS-nodeps.txt"
    install "rlmono" --no-deps --no-build-isolation -e "$ROOT"
}

install_gpu() {     # untested: the GPU machines at hand had no package index
    install "rlmono, sglang, megatron-core and CUDA builds" -e "$ROOT[gpu]"
}

install_test() {
    install "what tests need" --only-binary :all: -r "$PINS-test.txt"
}

digest() { { cat "${sources[@]}"; "$VENV/bin/python" -V; echo "$ROOT"; } 2>&1 | sha256sum; }

PINS=$ROOT/launch/requirements
LOG=$VENV/install.log
kind=${1:-$([ -e "$VENV/installed-gpu" ] && echo gpu || echo cpu)}
case $kind in
    cpu) sources=("$PINS-torch.txt" "$PINS-cpu.txt" "$PINS-nodeps.txt") ;;
    gpu) sources=("$ROOT/setup.cfg") ;;
    test) sources=("$PINS-test.txt") ;;
    *) die "can install cpu, gpu or test, not '$kind'" ;;
esac

stamp=$VENV/installed-$kind
[ -e "$stamp" ] && [ "$(cat "$stamp")" = "$(digest)" ] && exit 0
mkdir -p "$VENV"
exec 9>"$VENV/install.lock"
flock 9                         # one at a time: the second finds the work done
if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$(digest)" ]; then
    make_venv
    "install_$kind"
    digest >"$stamp"
fi
