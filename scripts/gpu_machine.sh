#!/usr/bin/env bash
# On a GPU machine without a network that has Python 3.12, torch and transformers: put the wheels of .whl beside them
# (in .site, nothing else is changed), run tests/gpu and the GPU check, and leave all results in FOLDER. 7 minutes.
#
# usage: scripts/gpu_machine.sh FOLDER [option of gpu_check.py...]
#   before, where there is a network: make gpu-wheels
set -uo pipefail

out=$1
options=("${@:2}")
readonly while_tests_run=machine,kernels,merge,load,parity
readonly alone=machine,load,encode,decode,graph,profile,attention,compiled,memory,hf,experts,ranks
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

mkdir -p "$out"
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .site .whl/*.whl || exit
export PYTHONPATH=$PWD/.site:$PWD
nvidia-smi >"$out/smi.txt" 2>&1
(
    timeout --signal=INT 190 python3 -m pytest tests/gpu -n 8 -rs -p no:cacheprovider --junitxml "$out/tests.xml" >"$out/tests.txt" 2>&1
    echo "status $?" >>"$out/tests.txt"
) &
check() { python3 scripts/gpu_check.py --output "$out/check.jsonl" "${options[@]}" "$@"; }
check --budget 120 --stages $while_tests_run >"$out/first.txt" 2>&1
wait
tail -n 15 "$out/tests.txt"
check --budget 235 --stages $alone 2>&1 | tee "$out/second.txt" | cut -c 1-260
python3 scripts/gpu_check.py --report "$out/check.jsonl" >"$out/tables.md"
