#!/usr/bin/env bash
# Distil SmolLM2-135M into a student cut out of it, on what this machine has. `make demo` runs it in .venv.
#
#   two or more GPUs   the teacher on the last, one rank on each of the others
#   one GPU            the teacher on it, two ranks on the CPU
#   none               the teacher and two ranks on the CPU
set -euo pipefail
cd "$(dirname "$0")/.."

model=$(python scripts/demo_model.py)
gpus=$(python -c "import torch; print(torch.cuda.device_count())") # of this torch: a CPU build sees none
steps=60

if ((gpus >= 2)); then
  devices=(--teacher-gpu $((gpus - 1)) --train-gpus "0-$((gpus - 2))")
  steps=400
elif ((gpus == 1)); then
  devices=(--teacher-gpu 0 --cpu 2)
else
  devices=(--cpu 2)
fi

# bfloat16 halves the time where the processor computes in it, and multiplies it where it does not.
if ((gpus >= 2)) || grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
  bf16=(--bf16)
  dtype=bfloat16
else
  bf16=()
  dtype=float32
  steps=40
fi
if ((gpus == 1)); then
  dtype=bfloat16
fi

# The loss works in chunks of many megabytes. By default glibc gives each back to the system and faults it in again, which
# takes a tenth of a rank's time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184

exec shmbridge-launch --config configs/demo.yaml "${devices[@]}" --teacher "$model" "teacher.dtype=$dtype" -- \
  scripts/train_student.py --steps "$steps" --out runs/demo "${bf16[@]}" "$@"
