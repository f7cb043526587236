#!/usr/bin/env bash
# From nothing to a trained model on a CPU, in minutes: ./launch/quickstart.sh [--seed N] [--shuffled] [--gpu] [--option value …]
#
# Installs rlmono into .venv where it is not yet, makes a tiny Qwen3 and problems of two-digit addition, teaches it by
# supervised fine-tuning, improves it by GRPO on 2 colocated device ranks, and writes a report with pictures. Every start
# has a new folder, runs/quickstart-N, runs/quickstart-N-2, …
#
#   --seed N      of weights, data and sampling (default 0)
#   --shuffled    the control: GRPO with labels that are all wrong
#   --gpu         on one GPU. Where there is no .venv, and python3 has sglang and megatron-core, nothing is installed
# Other options go to the GRPO run, as in launch/run.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

seed=0 control='' kind='' options=()
while [ $# -gt 0 ]; do
    case $1 in
        --seed) [[ ${2:-} =~ ^[0-9]+$ ]] || die "--seed needs a number"; seed=$2; shift ;;
        --shuffled) control=shuffled ;;
        --gpu) kind=gpu ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
        *) options+=("$1") ;;
    esac
    shift
done

if [ "$kind" = gpu ]; then
    [ -e /dev/nvidiactl ] || [ -e /dev/nvidia0 ] || die "--gpu: there is no NVIDIA GPU here (no /dev/nvidiactl); leave it out to use the CPU"
    export RLMONO_DEVICE=cuda RLMONO_ACTOR_NUM_GPUS_PER_NODE=1      # before what the recipes say
fi
if [ "$kind" != gpu ] || [ -x "$VENV/bin/python" ] || ! "$PYTHON" -c 'import sglang, megatron.core, zmq, msgspec' 2>/dev/null; then
    # shellcheck disable=SC2086 - without a kind, what is installed already
    "$ROOT/launch/install.sh" $kind
    PYTHON=$VENV/bin/python
fi

name=runs/quickstart-$seed${control:+-$control}
folder=$name again=1
cd "$ROOT"
mkdir -p runs
until mkdir "$folder" 2>/dev/null; do again=$((again + 1)); folder=$name-$again; done

export QUICKSTART=$folder RLMONO_SEED=$((1234 + seed)) RLMONO_ROLLOUT_SEED=$((42 + seed))
[ -z "$control" ] || options+=(--prompt-data "$folder/data/shuffled.jsonl")
echo "1/3  a tiny model, and its problems"
"$PYTHON" -m rlmono.quickstart make "$folder/data" --seed "$seed"
echo "2/3  supervised fine-tuning: what a sum looks like"
launch/run.sh --env-file configs/recipes/quickstart-sft.env
echo "3/3  GRPO${control:+ with $control labels}: what is rewarded"
launch/run.sh --env-file configs/recipes/quickstart-grpo.env "${options[@]}"
echo
"$PYTHON" -m rlmono.quickstart result "$folder/grpo"
echo "model:  $folder/grpo/model (a Hugging Face folder)"
echo "report: $folder/grpo/report/index.html"
