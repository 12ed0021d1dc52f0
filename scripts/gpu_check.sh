#!/usr/bin/env bash
# What only a GPU can show, in stages that go on where they stopped: facts, ipc, protocol, deaths, rest, bench, train.
#
#     scripts/gpu_check.sh                          every stage that has not passed yet
#     scripts/gpu_check.sh ipc protocol             these alone
#     scripts/gpu_check.sh --again train            also where it has passed
#     scripts/gpu_check.sh --wheels DIRECTORY ...   first put these wheels beside the machine's own packages
#     scripts/gpu_check.sh --help                   all options
#
# It runs in an environment that is not its own: the torch of PYTHON (default: python3) is used as it is, and nothing is
# installed into it. Wheels go to a directory of their own, without their requirements and without a network.
# Exits 0 where every stage passed, 1 where one did not, 2 where nothing can be checked (no CUDA device, a package missing).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$PWD/runs/gpu_check.site
if [[ ${1:-} == --wheels ]]; then
    wheels=${2:?--wheels needs a directory with .whl files}
    shift 2
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" scripts/gpu/check.py "$@"
