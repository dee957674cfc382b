#!/usr/bin/env bash
# Everything that only a GPU can tell, in one JSON: bash tests/gpu/run.sh [--toy] [--only PART]…
# Writes $OUT/gpu.json (after every part), a log a part and a Chrome trace. --toy: the same at toy size on a CPU, which proves the
# script. On a box without a network, carry the wheels that tests/gpu/wheels.sh fetched.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${OUT:-gpu_out} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
if compgen -G "tests/gpu/wheels/*.whl" >/dev/null; then
  python3 -m pip install --quiet --no-index --no-deps --disable-pip-version-check tests/gpu/wheels/*.whl
fi
exec python3 tests/gpu/measure.py --out "$OUT" "$@"
