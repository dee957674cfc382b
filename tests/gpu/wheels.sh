#!/usr/bin/env bash
# Fetch what a GPU box with torch, numpy, scipy, transformers and pytest, and no network, lacks: bash tests/gpu/wheels.sh
# [PYTHON_VERSION]. Exact versions are those of constraints.txt. The folder stays under 64 MiB, or this fails.
set -euo pipefail
cd "$(dirname "$0")"
version=${1:-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
names="zarr numcodecs donfig google-crc32c crc32c zstandard beartype jaxtyping wadler_lindig click hypothesis sortedcontainers Jinja2 MarkupSafe tqdm"
rm -rf wheels && mkdir wheels
for name in $names; do
  line=$(grep -i "^$name==" ../../constraints.txt) || { echo "$name is not in constraints.txt" >&2; exit 1; }
  python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" --platform manylinux2014_x86_64 \
    --platform manylinux_2_28_x86_64 --platform any --disable-pip-version-check -d wheels "$line"
done
size=$(du -sm wheels | cut -f1)
echo "$(ls wheels | wc -l) wheels, $size MiB, for Python $version"
[ "$size" -lt 64 ]
