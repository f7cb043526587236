#!/usr/bin/env bash
# Start a run over ssh on the hosts of an MPI hostfile: ./launch/hostfile.sh HOSTFILE [--option value …]
#
#   10.0.0.1 slots=8
#   10.0.0.2 slots=8
#
# A line a node; slots are its devices. The first has the controller. Every host must reach this folder at the same path
# and be reached without a password. RLMONO_*, NCCL_*, BASE_DIR and MASTER_PORT go along. When one host ends
# with an error, or this script is ended, the others are stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -gt 0 ] && [ -r "$1" ] || die "the first argument must be a hostfile, with lines like: 10.0.0.1 slots=8"
file=$1
shift
hosts=() slots=''
while read -r host rest; do
    case $host in '' | '#'*) continue ;; esac
    [[ $rest =~ ^slots=([0-9]+) ]] || die "$file: no slots=<devices> after $host"
    [ "${slots:=${BASH_REMATCH[1]}}" = "${BASH_REMATCH[1]}" ] || die "$file: $host has ${BASH_REMATCH[1]} slots, others $slots: nodes must be alike"
    hosts+=("$host")
done <"$file"
[ ${#hosts[@]} -gt 0 ] || die "$file names no host"

settings=("NNODES=${#hosts[@]}" "MASTER_ADDR=${hosts[0]}" "MASTER_PORT=${MASTER_PORT:-29400}" "NPROC_PER_NODE=$((slots + 1))")
for name in "${!RLMONO_@}" "${!NCCL_@}" "${!BASE_DIR@}"; do settings+=("$name=${!name}"); done

# A host's run ends when its standard input does, which happens whichever way this script ends: it alone holds the pipe.
pipe=$(mktemp -d)
mkfifo "$pipe/hold"
exec 7<>"$pipe/hold" 8<"$pipe/hold" 9>"$pipe/hold" 7>&-
rm -r "$pipe"
guarded='exec 3<&0; "$@" 3<&- </dev/null & run=$!; (read -r _ <&3; kill "$run") >/dev/null 2>&1 & guard=$!;'
guarded+=' wait "$run"; status=$?; kill "$guard" 2>/dev/null; exit "$status"'

pids=()
for i in "${!hosts[@]}"; do
    words=$(printf '%q ' env "${settings[@]}" "NODE_RANK=$i" "$ROOT/launch/run.sh" "$@")
    ssh -o BatchMode=yes "${hosts[i]}" "cd $(printf %q "$PWD") && exec bash -c $(printf %q "$guarded") run.sh $words" <&8 9>&- &
    pids+=($!)
done

trap 'exec 9>&-; kill "${pids[@]}" 2>/dev/null || true' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
for _ in "${pids[@]}"; do
    wait -n || { status=$?; echo "hostfile.sh: a host ended with status $status; stopping the others" >&2; exit "$status"; }
done
