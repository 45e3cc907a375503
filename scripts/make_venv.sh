#!/usr/bin/env bash
# Make the virtual environment $1 with the interpreter $2 (or one that is found) and install megatron-star in it.
# An environment that was not finished is made anew. One that this script did not make is kept and installed into.
set -euo pipefail

venv=$1
here=$(dirname "$0")
if [[ ! -x $venv/bin/python || -e $venv/.unfinished ]]; then
    python=$("$here/find_python.sh" "${2:-}")
    mkdir -p "$venv" && touch "$venv/.unfinished"
    "$here/step.sh" "Making $venv with $python" "$python" -m venv "$venv"
fi
# Two levels of --quiet: pip warns about this or that index of the machine, and prints errors all the same. Byte code of
# what is used is made at the first import; for all 20,000 files it takes a minute.
"$here/step.sh" "Installing megatron-star, torch and the rest into $venv (some minutes, 6 GB)" \
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile --editable '.[dev]'
rm -f "$venv/.unfinished"
touch "$venv/.installed"
