#!/usr/bin/env bash
# Print a Python that megatron-star can be installed with: the first candidate that runs, is of a version that all
# dependencies have wheels for, and can make virtual environments. Candidates are run, not looked up: a pyenv shim is on
# PATH even when it does not work.
#
# usage: find_python.sh [PYTHON]     with PYTHON, that one or none
set -euo pipefail
shopt -s nullglob

readonly wanted="3.12 or 3.13"
readonly check='
import sys
if not (3, 12) <= sys.version_info[:2] <= (3, 13): sys.exit("it is Python %d.%d" % sys.version_info[:2])
try: import ensurepip, venv
except ImportError: sys.exit("it cannot make virtual environments: install its venv package (python3-venv)")
print(sys.executable)'

if [[ -n ${1:-} ]]; then
    if result=$("$1" -c "$check" 2>&1); then
        echo "$result"
        exit
    fi
    echo "PYTHON=$1 cannot be used, megatron-star needs Python $wanted: $(head -n 1 <<<"$result")" >&2
    exit 1
fi
for candidate in python3.12 python3.13 python3 python "${HOME:-/root}"/.pyenv/versions/3.1[23]*/bin/python \
    {/usr,/usr/local}/bin/python3.1[23] /opt/python*/bin/python3 {/opt,"${HOME:-/root}"}/*conda*/bin/python3 \
    "${HOME:-/root}"/.local/share/uv/python/*3.1[23]*/bin/python3; do
    "$candidate" -c "$check" 2>/dev/null && exit
done
echo "megatron-star needs Python $wanted and found none: install one, or name it with 'make PYTHON=/path/to/python3.12'." >&2
exit 1
