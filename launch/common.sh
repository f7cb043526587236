# Sourced by the other scripts: where things are, and how to stop with a message.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${RLMONO_VENV:-$ROOT/.venv}
PYTHON=$VENV/bin/python
[ -x "$PYTHON" ] || PYTHON=python3        # a machine with an installation of its own
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

die() { echo "${0##*/}: $*" >&2; exit 2; }
