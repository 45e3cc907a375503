#!/usr/bin/env bash
# In a container of NVIDIA's PyTorch: install this checkout with what it needs. What was built for the image's CUDA
# stays as it is: it goes into a list of constraints, and another torch is an error. The image's own list, which this
# one replaces, holds back everything else, too.
#
# usage: scripts/install_in_container.sh [PYTHON]        default: python3
set -euo pipefail

python=${1:-python3} constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
cd "$(dirname "$0")/.."

version_of_torch() { "$python" -c 'import torch; print(torch.__version__)'; }

"$python" -m pip list --format=freeze --disable-pip-version-check |
    grep -iE '^(torch|triton|pytorch-triton|apex|numpy|nvidia|transformer|flash|cuda)[^=]*==' |
    grep -ivE '^transformers==' >"$constraints"
grep -q '^torch==' "$constraints" || { echo "error: $python has no torch" >&2; exit 2; }
before=$(version_of_torch)
PIP_CONSTRAINT=$constraints "$python" -m pip install --quiet --no-cache-dir --disable-pip-version-check --editable '.[otel]'
[[ $(version_of_torch) == "$before" ]] || { echo "error: torch was $before, and is $(version_of_torch)" >&2; exit 1; }
"$python" -m compileall -q megatron_star checkpoints_tools
"$python" -W ignore -c 'import megatron_star.programs.serve'
echo "installed beside torch $before"
