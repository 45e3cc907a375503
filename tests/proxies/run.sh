#!/bin/bash
# Replicas of the server behind real proxies: a rolling restart without a lost request, and questions that find their
# document. nginx and HAProxy run with docs/proxies/ as it is, in a network of their own. Not part of pytest: root.
#
#   tests/proxies/run.sh [PYTHON]        default: .venv/bin/python
#
# DEMO is the folder that `make model` fills (.demo). Skips, with one line, without it, root, the proxies or Debian.
set -euo pipefail

REPOSITORY=$(dirname "$(dirname "$(dirname "$(realpath "$0")")")")
PYTHON=${1:-$REPOSITORY/.venv/bin/python}
DEMO=${DEMO:-$REPOSITORY/.demo}
SECONDS_FOR_ALL=400

skip() { echo "tests/proxies/run.sh skips: $*"; exit 0; }

install_proxies() {
    command -v apt-get >/dev/null || return
    # A package may start a daemon of its own, which is not wanted here.
    printf '#!/bin/sh\nexit 101\n' >"$WORK/policy-rc.d"
    chmod +x "$WORK/policy-rc.d"
    [[ -e /usr/sbin/policy-rc.d ]] || { cp "$WORK/policy-rc.d" /usr/sbin/ && POLICY=/usr/sbin/policy-rc.d; }
    (timeout 60 apt-get update -qq; DEBIAN_FRONTEND=noninteractive timeout 120 apt-get install -y -qq \
        --no-install-recommends nginx-light haproxy iproute2) >/dev/null 2>&1
}

[[ $(id -u) == 0 ]] || skip "it needs root, for a network of its own"
[[ -e $DEMO/megatron/latest_checkpointed_iteration.txt ]] || skip "no model in $DEMO: make model"
unshare --net true 2>/dev/null || skip "this root may not make a network of its own"
WORK=$(mktemp -d /tmp/star-proxies.XXXXXX) POLICY=
trap 'rm -rf "$WORK" $POLICY' EXIT
missing=
for program in nginx haproxy ip; do
    command -v "$program" >/dev/null || missing+=" $program"
done
[[ -z $missing ]] || install_proxies || skip "no$missing here, and apt cannot install them"

export OMP_NUM_THREADS=1 PYTHONPATH=$REPOSITORY:$REPOSITORY/tests/server GLOO_SOCKET_IFNAME=lo
# Ends with everything in it: what it starts dies with it.
timeout --foreground --kill-after=20 "$SECONDS_FOR_ALL" \
    unshare --net --pid --fork --kill-child --mount-proc bash -c 'ip link set lo up && exec "$@"' - \
    "$PYTHON" "$REPOSITORY/tests/proxies/replicas.py" --load "$DEMO/megatron" --work "$WORK"
