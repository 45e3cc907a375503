#!/usr/bin/env bash
# Make the virtual environment $1 with the interpreter $2 (or one that is found) and install megatron-star in it.
# An environment that was not finished is made anew. One that this script did not make is kept and installed into.
set -euo pipefail

venv=$1
here=$(dirname "$0")
if [[ -e $venv/.unfinished ]]; then
    rm -rf "$venv"
elif [[ -n $(ls -A "$venv" 2>/dev/null) && ! -x $venv/bin/python ]]; then
    echo "$venv exists and is no virtual environment: choose another with 'make VENV=DIR'." >&2
    exit 1
fi
if [[ ! -x $venv/bin/python ]]; then
    python=$("$here/find_python.sh" "${2:-}")
    mkdir -p "$venv" && touch "$venv/.unfinished"
    "$here/step.sh" "Making $venv with $python" "$python" -m venv "$venv"
fi
# Two levels of --quiet: pip warns about this or that index of the machine, and prints errors all the same.
"$here/step.sh" "Installing megatron-star, torch and the rest into $venv (some minutes, 6 GB)" \
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile --editable '.[dev]'
# pip compiles on one core, and a Python that is told to write no byte code would compile at every start.
"$here/step.sh" "Compiling byte code" "$venv/bin/python" -W ignore -m compileall -qq -j 0 "$venv/lib" || true
rm -f "$venv/.unfinished"
touch "$venv/.installed"
