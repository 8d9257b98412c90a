#!/usr/bin/env bash
# Check and measure the backends on a GPU, from a bare checkout: gpu.sh [conform|measure] [options], see gpu.py --help.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/backends${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/asv_bench/gpu.py" "$@"
