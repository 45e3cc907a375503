#!/bin/bash
# From a Slurm cluster to an answer, on a real Slurm of two nodes on this machine. Not part of pytest: minutes, root.
#
#   tests/slurm/run.sh [PYTHON]        default: .venv/bin/python
#
# SLURM_LAB is the folder of up.sh and down.sh, which start and stop the nodes (default: ../shared/slurm beside the
# checkout); DEMO the folder that `make model` fills (.demo). Skips, with one line, without them, root or Slurm.
set -euo pipefail

REPOSITORY=$(dirname "$(dirname "$(dirname "$(realpath "$0")")")")
SECONDS_FOR_ALL=1500 SECONDS_FOR_A_JOB=300
[[ -n ${SLURM_LAB_GUARDED:-} ]] ||
    SLURM_LAB_GUARDED=yes exec timeout --foreground --kill-after=60 "$SECONDS_FOR_ALL" "$0" "$@"

export REPOSITORY PYTHON=${1:-$REPOSITORY/.venv/bin/python}
export GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 PYTHONPATH=$REPOSITORY
SLURM_LAB=${SLURM_LAB:-$REPOSITORY/../shared/slurm} DEMO=${DEMO:-$REPOSITORY/.demo}
source "$REPOSITORY/tests/slurm/lab.sh"
skip_without_what_it_needs
WORK=$(mktemp -d /tmp/star-slurm.XXXXXX)
LAB=$WORK/lab
export SLURM_CONF=$LAB/slurm.conf
trap stop_slurm EXIT
trap 'die interrupted' INT TERM
start_slurm
cd "$WORK"
LAUNCH=$REPOSITORY/launch NODES=(--nodes=2 --ntasks-per-node=1)
export TP=1 CP=2 BLOCK_SIZE=1K CHECKPOINT=$WORK/smollm2
step "Slurm has two nodes"

convert_two_models() {
    HF=$DEMO/hf submit "$LAUNCH/convert.sbatch" --dtype float32
    local first=$JOB
    "$PYTHON" "$REPOSITORY/tests/slurm/random_model.py" "$DEMO/hf" random-hf >random.log 2>&1 || die "no random model"
    HF=$WORK/random-hf CHECKPOINT=$WORK/random submit "$LAUNCH/convert.sbatch"
    finish 0
    select_job "$first"
    finish 0
    step "convert.sbatch converts SmolLM2, and a small random model"
}

generate_on_two_nodes() {
    mkdir -p question/.demo
    ln -s "$DEMO/packages" question/.demo/packages
    ln -s "$WORK/smollm2" question/.demo/megatron
    local needle
    needle=$(cd question && "$PYTHON" -c "from megatron_star.programs.demo import write_question; print(*write_question(0).references)")
    CONTEXT_FILE=$WORK/question/.demo/needle/context.txt QUERY=$(cat question/.demo/needle/query.txt) \
        submit "${NODES[@]}" "$LAUNCH/generate.sbatch" --chat --top-k 1 --num-tokens-to-generate 32
    finish 0
    says "$needle" || die "the answer lacks $needle"
    step "generate.sbatch answers the demo's question on two nodes: $(grep "$needle" "$LOG")"
}

generate_at_tp_2_by_cp_2() {
    local launcher
    for launcher in srun torchrun; do
        LAUNCHER=$launcher CHECKPOINT=$WORK/random TP=2 CONTEXT_FILE=$WORK/question/.demo/needle/context.txt QUERY=why \
            submit --nodes=2 --ntasks-per-node=2 "$LAUNCH/generate.sbatch" --top-k 1 \
            --num-tokens-to-generate 8 --output "$WORK/$launcher.json"
        finish 0
        step "TP 2 x CP 2: ranks of $launcher generate"
    done
    "$PYTHON" -c "import json; a, b = (json.load(open(f'{name}.json'))['tokens'] for name in ('srun', 'torchrun'))
assert a == b and len(a) == 8, (a, b)" || die "srun and torchrun answer differently"
}

serve_until_the_time_limit() {  # starts it; see end_at_the_time_limit
    CHECKPOINT=$WORK/random PORT=5001 submit "${NODES[@]}" --time=3 "$LAUNCH/serve.sbatch"
    LIMITED=$JOB
    wait_for "$SECONDS_FOR_A_JOB" "server" is_ready 1
}
end_at_the_time_limit() {
    select_job "$LIMITED"
    finish 0
    says '^draining: ' && says '^stopped' || die "no draining before the time limit"
    step "a minute before its time limit, a server drains and ends with 0"
}

refuse_wrong_set_ups() {
    local question=("${NODES[@]}" "$LAUNCH/generate.sbatch" --context-file "$WORK/question/.demo/needle/query.txt" --query why)
    CP=3 submit "${question[@]}"
    refused "CP x TP mismatch" "TP 1 x CP 3 needs 3 ranks, but 2 nodes x 1 tasks are 2: use CP=2 or --nodes=3"
    PORT=5001 submit "${NODES[@]}" "$LAUNCH/serve.sbatch"
    refused "port in use" "port 5001 of n1 is in use"
    on_node n2 mount -t tmpfs none "$WORK/random"
    CHECKPOINT=$WORK/random submit "${question[@]}"
    refused "no checkpoint on one node" "rank 1: $WORK/random: not a checkpoint"
    on_node n2 umount "$WORK/random"
    cp -r "$REPOSITORY/megatron_star" other-code && echo "# changed" >>other-code/config.py
    on_node n2 mount --bind "$WORK/other-code" "$REPOSITORY/megatron_star"
    CHECKPOINT=$WORK/random submit "${question[@]}"
    refused "other code on one node" "rank 1: other code of megatron_star than rank 0"
    on_node n2 umount "$REPOSITORY/megatron_star"
}

start_server() {  # PORT SBATCH-ARGUMENTS...
    PORT=$1 submit "${NODES[@]}" "${@:2}" "$LAUNCH/serve.sbatch"
}
ask_in_the_background() {  # PORT: a request that takes seconds; returns when the server has begun it
    ask "$1" "1, 2, 3, 4, 5," "$LONG_ANSWER" >"long-$1.json" &
    sleep 1.5
}
answered() {  # PORT: that request has all its tokens, though the server was told to end while it ran
    wait_for 60 "end of the server" says '^stopped'
    grep -q '"completion_tokens":'"$LONG_ANSWER" "long-$1.json" || die "cut off: $(cat "long-$1.json")"
}

serve_and_kill_a_worker() {
    start_server 5000
    wait_for "$SECONDS_FOR_A_JOB" "server" is_ready 1
    [[ $(ask 5000 "The capital of France is" 8) == *Paris* ]] || die "no answer from the server"
    step "serve.sbatch answers a request from outside the job"
    local worker
    worker=$(worker_pid)
    kill -9 "$worker"
    wait_for 60 "requeue" says "requeueing job $JOB"
    wait_for 60 "restart" is_restarted
    wait_for "$SECONDS_FOR_A_JOB" "second start" is_ready 2
    [[ $(ask 5000 "The capital of France is" 8) == *Paris* ]] || die "no answer after the restart"
    step "a killed worker: $(grep -m 1 'has ended' "$LOG"); the job requeues and serves again"
    LONG_ANSWER=60 && ask_in_the_background 5000
    scancel --signal=TERM "$JOB"
    answered 5000
    finish 0
    step "scancel --signal=TERM drains: the running request is answered, the job ends with 0"
}

drain_after_a_plain_scancel_and_under_torchrun() {
    export CHECKPOINT=$WORK/random LONG_ANSWER=500
    start_server 5002
    local plain=$JOB
    LAUNCHER=torchrun start_server 5003
    wait_for "$SECONDS_FOR_A_JOB" "server of torchrun" is_ready 1
    ask_in_the_background 5003
    scancel --signal=TERM "$JOB"
    answered 5003
    finish 143
    step "LAUNCHER=torchrun: scancel --signal=TERM drains, the job ends with 143"
    select_job "$plain"
    wait_for "$SECONDS_FOR_A_JOB" "server" is_ready 1
    ask_in_the_background 5002
    scancel "$JOB"
    answered 5002
    wait_for "$SECONDS_FOR_A_JOB" "end of job $JOB" is_over
    step "a plain scancel drains too, within KillWait; the job is $(field JobState)"
}

lose_a_node() {
    start_server 5004 --no-requeue
    wait_for "$SECONDS_FOR_A_JOB" "server" is_ready 1
    ip link set labv2 down
    local before=$SECONDS
    wait_for 60 "notice of a lost node" says '^error: rank 1 has ended'
    step "a node is gone: $(grep -m 1 '^error: rank 1' "$LOG") ($((SECONDS - before)) s)"
    wait_for "$SECONDS_FOR_A_JOB" "end of job $JOB" is_over
    [[ $(field JobState) != COMPLETED ]] || die "the job has succeeded without its node"
    step "its job is $(field JobState), exit code $(field ExitCode) ($((SECONDS - before)) s)"
    start_server 5005
    wait_for 60 "reason why the job waits" reason_names_nodes
    step "a job that needs it waits: $(squeue --noheader --jobs "$JOB" --format %r)"
    ip link set labv2 up
    scancel "$JOB"
}
reason_names_nodes() { squeue --noheader --jobs "$JOB" --format %r | grep -qi node; }

convert_two_models
generate_on_two_nodes
generate_at_tp_2_by_cp_2
serve_until_the_time_limit
refuse_wrong_set_ups
serve_and_kill_a_worker
end_at_the_time_limit
drain_after_a_plain_scancel_and_under_torchrun
lose_a_node
echo "tests/slurm/run.sh passed in $SECONDS s"
