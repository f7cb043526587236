#!/usr/bin/env bash
# Start a run on this node: ./launch/run.sh --env-file configs/recipes/qwen3-4B-8gpu.env [--option value …]
#
# On several nodes start it on each, with the same options and
#   NNODES        number of nodes (default 1)
#   NODE_RANK     0, 1, … ; 0 has the controller and the rendezvous
#   MASTER_ADDR   address of node 0, as the others reach it
#   MASTER_PORT   a free port there (default 29400)
# launch/hostfile.sh and slurm/train.sbatch do that. NPROC_PER_NODE overrides how many ranks a node starts
# (devices + 1 host rank; the configuration says). --help lists the options. Exit status 2:
# refused, nothing was started.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=${NNODES:-1}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "NNODES is '$nodes', not a number of nodes"
rendezvous=()           # alone, torchrun takes a free port
if [ "$nodes" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] || die "NNODES=$nodes needs NODE_RANK (0 to $((nodes - 1))) and MASTER_ADDR"
    rendezvous=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29400}")
fi

"$PYTHON" -c 'import zmq, msgspec' 2>/dev/null || die "rlmono is not installed for $PYTHON: run ./launch/install.sh first"
for word in "$@"; do
    case $word in --dry-run | --help | -h) exec "$PYTHON" -m rlmono train "$@" ;; esac
done
ranks=$("$PYTHON" -m rlmono ranks "$@")       # checks the whole configuration, and says what is wrong with it

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}       # a rank sets its own
exec "$PYTHON" "$ROOT/launch/torchrun.py" --max-restarts 0 --nnodes "$nodes" --nproc-per-node "$ranks" "${rendezvous[@]}" -m rlmono train "$@"
