#!/usr/bin/env bash
# Lint, type-check and test: ./launch/test.sh [--slow|--faults|--gpu|--slurm] [pytest arguments …]
#
# Without an option, all that two cores do in minutes. --slow adds the tests marked slow; --faults, --gpu and --slurm
# run the tests of that folder instead (a GPU; a Slurm that the tests start).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$ROOT/launch/install.sh"
"$ROOT/launch/install.sh" test
PYTHON=$VENV/bin/python
cd "$ROOT"

marks='not slow and not gpu and not faults and not slurm' tests=()
case ${1:-} in
    --slow) marks='not gpu and not faults and not slurm'; shift ;;
    --faults | --gpu | --slurm) tests=("tests/${1#--}"); marks=''; shift ;;
esac

status=0
"$PYTHON" -m ruff check . || status=1
"$PYTHON" -m mypy || status=1
[ "$status" = 0 ] || echo "test: ruff or mypy has found something, see above" >&2
"$PYTHON" -m pytest --durations 12 -m "$marks" "$@" "${tests[@]}" || status=$?
exit "$status"
