#!/usr/bin/env bash
# Other people's clients as they are on PyPI and npm, against a server on SmolLM2: a line a case, status 1 if one failed.
#
#   tests/clients/run.sh [FOLDER]     needs .demo/megatron (make model), node and npm, 2.5 GB in FOLDER (default: /tmp/clients)
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-/tmp/clients}
python=${PYTHON:-.venv/bin/python}
port=${PORT:-5997}
mkdir -p "$folder"
echo 'litellm<0' > "$folder/constraints.txt"  # a release of it was compromised

environment() {  # NAME PACKAGE ..: an environment of its own with these packages
    local name=$1
    shift
    [[ -x $folder/$name/bin/python ]] || "$python" -m venv "$folder/$name"
    "$folder/$name/bin/pip" install -qq --disable-pip-version-check -c "$folder/constraints.txt" "$@"
}

environment agents 'langchain-openai>=1,<2' 'llama-index-llms-openai-like>=0.8,<0.9'
environment instructor 'instructor>=1.17,<2'
environment evalscope 'evalscope[perf]>=1.14,<2'
cp tests/clients/node_clients.mjs "$folder/"
echo '{"private": true}' > "$folder/package.json"
(cd "$folder" && npm install --silent --no-audit --no-fund openai@7 ai@7 @ai-sdk/openai-compatible@3 zod@4)

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((port + 1)) \
    "$python" launch/run_text_generation_server.py --load .demo/megatron --served-model-name smollm2 \
    --tool-call-parser hermes --port "$port" > "$folder/server.log" 2>&1 &
server=$!
trap 'kill -TERM $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
url=http://127.0.0.1:$port
for _ in $(seq 240); do
    curl -sf "$url/health" > /dev/null && break
    kill -0 $server || { cat "$folder/server.log"; exit 1; }
    sleep 0.5
done

failed=0
node "$folder/node_clients.mjs" "$url" smollm2 || failed=1
"$folder/instructor/bin/python" tests/clients/instructor_modes.py "$url" smollm2 || failed=1
"$folder/agents/bin/python" tests/clients/agent_libraries.py "$url" smollm2 || failed=1
if "$folder/evalscope/bin/evalscope" perf --url "$url/v1/chat/completions" --model smollm2 --api openai \
    --number 4 --parallel 2 --dataset random --tokenizer-path .demo/hf --max-tokens 16 --min-tokens 16 \
    --min-prompt-length 50 --max-prompt-length 100 --outputs-dir "$folder/evalscope-out" \
    > "$folder/evalscope.log" 2>&1 && grep -q '100%' "$folder/evalscope.log"; then
    echo "passed  evalscope perf: 4 chats"
else
    failed=1
    echo "FAILED  evalscope perf: $(tail -3 "$folder/evalscope.log")"
fi
exit $failed
