# shellcheck shell=bash
# What the .sbatch files and serve.sh share; sourced by them. Needs bash and, inside a job, Slurm's commands.

fail() {  # one line, and the status that means "the user's input": a job that ends with it is not requeued
    echo "error: $*" >&2
    exit 2
}

# TP inside a node, CP across nodes: srun numbers tasks node by node, and TP is the faster index of a rank.
check_grid() {  # NODES TASKS_PER_NODE TP CP
    local nodes=$1 tasks=$2 tp=$3 cp=$4 value
    for value in "$nodes" "$tasks" "$tp" "$cp"; do
        [[ $value =~ ^[1-9][0-9]*$ ]] || fail "'$value' of nodes '$nodes', tasks per node '$tasks', TP '$tp'," \
            "CP '$cp' is not a whole number of at least 1"
    done
    local ranks=$((nodes * tasks))
    if ((tasks % tp)); then
        fail "TP $tp does not divide $tasks tasks per node, so a TP group would cross nodes:" \
            "use --ntasks-per-node=$tp (with CP $nodes), or TP $(largest_divisor "$tasks" "$tp") with" \
            "CP $((ranks / $(largest_divisor "$tasks" "$tp")))"
    fi
    if ((tp * cp != ranks)); then
        fail "TP $tp x CP $cp needs $((tp * cp)) ranks, but $nodes nodes x $tasks tasks are $ranks:" \
            "use CP=$((ranks / tp))$(nodes_that_fit "$tasks" $((tp * cp)))"
    fi
}

# Experts spread over the ranks of TP x CP. Without EXPERT_TP, none that does not divide them is taken.
check_experts() {  # EP EXPERT_TP TP CP
    local ep=$1 expert_tp=${2:-1} ranks=$(($3 * $4)) value
    for value in "$ep" "$expert_tp"; do
        [[ $value =~ ^[1-9][0-9]*$ ]] || fail "'$value' of EP '$ep', EXPERT_TP '$expert_tp' is not a whole number" \
            "of at least 1"
    done
    if ((ranks % expert_tp)); then
        fail "EXPERT_TP $expert_tp does not divide the $ranks ranks of TP $3 x CP $4:" \
            "use EXPERT_TP=$(largest_divisor "$ranks" "$expert_tp")"
    fi
    if ((ranks % (ep * expert_tp))); then
        fail "EP $ep x EXPERT_TP $expert_tp does not divide the $ranks ranks of TP $3 x CP $4:" \
            "use EP=$(largest_divisor $((ranks / expert_tp)) "$ep")"
    fi
}

largest_divisor() {  # NUMBER BOUND: the largest divisor of NUMBER that is at most BOUND
    local divisor=$2
    while (($1 % divisor)); do divisor=$((divisor - 1)); done
    echo "$divisor"
}

nodes_that_fit() {  # TASKS_PER_NODE RANKS
    (($2 % $1)) || echo " or --nodes=$(($2 / $1))"
}

check_port_is_free() {  # PORT, on this machine
    [[ $1 =~ ^[0-9]+$ ]] && (($1 > 0 && $1 < 65536)) || fail "PORT is '$1': it must be a number from 1 to 65535"
    if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null || (exec 3<>"/dev/tcp/$(hostname)/$1") 2>/dev/null; then
        fail "port $1 of $(hostname) is in use: choose another with PORT="
    fi
}

check_programs() {  # of this repository and its environment, as the first node sees them
    [[ -f $REPOSITORY/launch/generate.py ]] ||
        fail "REPOSITORY is '$REPOSITORY', which is not a copy of megatron-star: call sbatch in one, or set REPOSITORY="
    [[ -n ${CONTAINER_IMAGE:-} ]] || command -v "$PYTHON" >/dev/null ||
        fail "PYTHON is '$PYTHON', which does not run on $(hostname): make setup, or set PYTHON="
}

tasks_per_node() {  # of this job, which must be the same on all nodes
    [[ $SLURM_TASKS_PER_NODE =~ ^([0-9]+)(\(x[0-9]+\))?$ ]] ||
        fail "nodes have different numbers of tasks ($SLURM_TASKS_PER_NODE): use --nodes and --ntasks-per-node"
    echo "${BASH_REMATCH[1]}"
}

# The batch script runs on the first node, where rank 0 will listen.
choose_address() {
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    local port=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0} * 131) % 12000))}
    [[ -z ${MASTER_PORT:-} ]] || check_port_is_free "$port"
    while (exec 3<>"/dev/tcp/$MASTER_ADDR/$port") 2>/dev/null; do port=$((port + 1)); done
    export MASTER_PORT=$port
}

# torchrun ends with 1 after a SIGTERM, whatever its ranks do; 143 says that the job was to end.
TORCHRUN='trap ENDING=143 TERM; "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"; exit "${ENDING:-$?}"'

# Ranks in a container see the repository at its own path: CONTAINER_OPTIONS are srun's, for pyxis, and
# CONTAINER_COMMAND is what comes before the program, for Apptainer.
choose_container() {
    local mounts=$REPOSITORY:$REPOSITORY${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    CONTAINER_OPTIONS=() CONTAINER_COMMAND=()
    [[ -n ${CONTAINER_IMAGE:-} ]] || return 0
    case ${CONTAINER_RUNTIME:-pyxis} in
        pyxis)
            CONTAINER_OPTIONS=(--container-image="$CONTAINER_IMAGE" --container-workdir="$REPOSITORY"
                --container-mounts="$mounts") ;;
        apptainer)
            CONTAINER_COMMAND=(apptainer exec --nv --bind "$mounts" --pwd "$REPOSITORY" "$CONTAINER_IMAGE") ;;
        *) fail "CONTAINER_RUNTIME is '$CONTAINER_RUNTIME': it must be pyxis or apptainer" ;;
    esac
}

# Run a program of this repository on the job's ranks, in the background; its process id is then RANKS_PID.
start_ranks() {  # PROGRAM ARGUMENTS...
    local tasks step=(srun --kill-on-bad-exit=1 --distribution=block) program=("$@")
    tasks=$(tasks_per_node) || exit
    check_programs
    choose_address
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1 PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
    choose_container
    case ${LAUNCHER:-srun} in
        srun) step+=("${CONTAINER_OPTIONS[@]}" "${CONTAINER_COMMAND[@]}" "$PYTHON") ;;
        torchrun)
            step+=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${CONTAINER_OPTIONS[@]}")
            step+=("${CONTAINER_COMMAND[@]}" bash -c "$TORCHRUN" "$PYTHON")
            program=(--nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$tasks" --master-addr="$MASTER_ADDR"
                --master-port="$MASTER_PORT" --shutdown-timeout="$((${DRAIN_SECONDS:-20} + 10))" "$@") ;;
        *) fail "LAUNCHER is '$LAUNCHER': it must be srun or torchrun" ;;
    esac
    cd "$REPOSITORY" || fail "cannot enter $REPOSITORY"
    "${step[@]}" "${program[@]}" &
    RANKS_PID=$!
}

# Wait for the ranks through signals: SIGTERM, which `scancel` and --signal=TERM send, lets them end by themselves.
finish_ranks() {  # the status of the worst rank is this function's
    local status
    wait "$RANKS_PID"
    status=$?
    while kill -0 "$RANKS_PID" 2>/dev/null; do
        wait "$RANKS_PID"
        status=$?
    done
    return "$status"
}

# Ranks that were killed or met an error are started again, MAX_RESTARTS times; not after wrong input (status 2), nor
# after the SIGTERM of somebody who wants the job to end, which ranks that still load the model end with (143).
requeue_after_a_failure() {  # STATUS
    local restarts=${SLURM_RESTART_COUNT:-0}
    if (($1 == 0 || $1 == 2 || $1 == 143)) || [[ -n $ENDING ]]; then
        exit "$1"
    fi
    if ((restarts >= MAX_RESTARTS)); then
        echo "error: the ranks ended with status $1, and were restarted $restarts times already" >&2
        exit "$1"
    fi
    echo "the ranks ended with status $1: requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # until Slurm ends this script
}
