#!/usr/bin/env bash
# What only a GPU can show: the tests of tests/gpu, then `scripts/bench.py cuda`, and one table of both.
#
#     scripts/gpu_check.sh              everything; some twenty minutes
#     scripts/gpu_check.sh --quick      without the slow tests, and a short benchmark
#
# Exits 0 only when every test passed (those that need a second GPU may be skipped) and every target is reached; 1 otherwise;
# 2 where torch finds no CUDA device. PYTHON names another interpreter.

set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
select=() bench=()
if [[ ${1:-} == --quick ]]; then
    select=(-m "not slow") bench=(--quick)
fi

if ! found=$("$python" -c 'import sys, torch; print("torch", torch.__version__); sys.exit(not torch.cuda.is_available())'); then
    echo "gpu_check: no CUDA here: torch.cuda.is_available() is False (${found:-torch cannot be imported}); nothing was checked" >&2
    exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m pytest tests/gpu -q --timeout 600 --junitxml "$scratch/tests.xml" "${select[@]}"
tests=$?
"$python" scripts/bench.py cuda --json "$scratch/bench.json" "${bench[@]}"
benchmark=$?
PYTHONPATH=scripts "$python" -m benchmarks.gpu_check "$scratch/tests.xml" "$scratch/bench.json"
table=$?
exit $((tests || benchmark || table))
