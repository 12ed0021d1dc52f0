#!/usr/bin/env bash
# Distil SmolLM2-135M into a student cut out of it, on what this machine has. `make demo` runs it in .venv.
#
#   two or more GPUs   the teacher on the last, one rank on each of the others
#   one GPU            the teacher on it, two ranks on the CPU
#   none               the teacher and two ranks on the CPU
#
# Arguments go to scripts/demo/train.py: `scripts/demo.sh --minutes 5`. With `scripts/demo.sh --on-policy` the student learns
# from its own samples, beside the same time on text: scripts/demo/on_policy.py, which the other arguments go to.
set -euo pipefail
cd "$(dirname "$0")/.."

script=train
if [[ ${1:-} == --on-policy ]]; then
  script=on_policy
  shift
fi
export XDG_CACHE_HOME="$PWD/.cache" # for the converted model: `make clean` removes it
model=$(python scripts/demo/model.py)
gpus=$(python -c "import torch; print(torch.cuda.device_count())") # of this torch: a CPU build sees none

# bfloat16 is several times faster where the processor computes in it, and several times slower where it does not.
# ATEN_CPU_CAPABILITY=avx2 is how torch is told to do without.
if grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo && [[ ${ATEN_CPU_CAPABILITY:-} != avx2 ]]; then
  dtype=bfloat16 training=(--bf16 --seq 64)
else
  dtype=float32 training=(--seq 32)
fi
if ((gpus >= 2)); then
  devices=(--teacher-gpu $((gpus - 1)) --train-gpus "0-$((gpus - 2))")
  dtype=bfloat16 training=(--bf16 --seq 256 --batch 8 --layers 8 --characters 20000000)
elif ((gpus == 1)); then
  devices=(--teacher-gpu 0 --cpu 2)
  dtype=bfloat16
else
  devices=(--cpu 2)
fi
if [[ -t 1 ]]; then
  training+=(--terminal)
fi

# The loss works in chunks of many megabytes. By default glibc gives each back to the system and faults it in again, which
# takes a tenth of a rank's time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184

exec shmbridge-launch --config configs/demo.yaml "${devices[@]}" --teacher "$model" "teacher.dtype=$dtype" -- \
  scripts/demo/$script.py --out runs/demo "${training[@]}" "$@"
