#!/bin/bash
# Serve a checkpoint over HTTP on this machine, with torchrun; no Slurm. In the root of the repository:
#
#   CHECKPOINT=llama-8b CP=8 launch/serve.sh
#
# Arguments go to launch/run_text_generation_server.py. Ctrl-C or SIGTERM drains.

CHECKPOINT=${CHECKPOINT:-}          # made by checkpoints_tools.convert_hf_to_megatron
TP=${TP:-1}                         # tensor-parallel size
CP=${CP:-1}                         # context-parallel size: TP x CP ranks are started
EP=${EP:-1}                         # expert-parallel size: divides TP x CP, and the experts of a layer
EXPERT_TP=${EXPERT_TP:-}            # ranks that share an expert; default: TP, or 1 where EP is more than 1
BLOCK_SIZE=${BLOCK_SIZE:-}          # tokens; without it, all sizes are chosen by the length of the context
ANCHOR_SIZE=${ANCHOR_SIZE:-}        # tokens; default: as large as the first block, or chosen
PASSED_KEYS=${PASSED_KEYS:-}        # of a block; default: none, or chosen
HOST=${HOST:-127.0.0.1}             # 0.0.0.0 serves to other machines
PORT=${PORT:-5000}
DRAIN_SECONDS=${DRAIN_SECONDS:-30}
REPOSITORY=${REPOSITORY:-$(dirname "$(dirname "$(realpath "$0")")")}
PYTHON=${PYTHON:-$REPOSITORY/.venv/bin/python}

source "$REPOSITORY/launch/slurm.sh" || exit 2
check_programs
check_grid 1 "$((TP * CP))" "$TP" "$CP"
check_experts "$EP" "$EXPERT_TP" "$TP" "$CP"
[[ -n $CHECKPOINT ]] || fail "CHECKPOINT is not set: the folder that convert_hf_to_megatron made"
check_port_is_free "$PORT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$((TP * CP))" \
    --shutdown-timeout "$((DRAIN_SECONDS + 10))" \
    "$REPOSITORY/launch/run_text_generation_server.py" --load "$CHECKPOINT" --tensor-model-parallel-size "$TP" \
    --context-parallel-size "$CP" --expert-model-parallel-size "$EP" \
    ${EXPERT_TP:+--expert-tensor-parallel-size "$EXPERT_TP"} ${BLOCK_SIZE:+--star-block-size "$BLOCK_SIZE"} \
    ${ANCHOR_SIZE:+--star-anchor-size "$ANCHOR_SIZE"} ${PASSED_KEYS:+--star-passed-keys "$PASSED_KEYS"} \
    --host "$HOST" --port "$PORT" --drain-seconds "$DRAIN_SECONDS" "$@"
