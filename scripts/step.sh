#!/usr/bin/env bash
# Run a command that is silent for long: say what it does, a dot every 3 s, and how long it took. What the command prints
# is shown only if it fails.
#
# usage: step.sh "What it does" COMMAND...
set -uo pipefail

output=$(mktemp)
printf '%s ' "$1"
"${@:2}" >"$output" 2>&1 </dev/null &
command=$!
(while sleep 3 &>/dev/null; do printf '.'; done) &
dots=$!
trap 'kill "$dots" "$command" 2>/dev/null; rm -f "$output"' EXIT
trap 'printf "\n"; exit 130' INT TERM

wait "$command"
status=$?
kill "$dots"
wait "$dots" 2>/dev/null
if ((status == 0)); then
    printf ' %s s\n' "$SECONDS"
else
    printf ' failed after %s s\n' "$SECONDS"
    cat "$output" >&2
fi
exit "$status"
