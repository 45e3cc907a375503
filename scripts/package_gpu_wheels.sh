#!/usr/bin/env bash
# Put megatron-star and everything that it needs into one folder, for a GPU machine without a network: some 4 GB of
# wheels and an install.sh. Run it where there is a network, with the Python, platform and system that the machine has.
# Wheels in build/gpu/wheels (`make te-check` builds TransformerEngine's there) go along.
#
# usage: package_gpu_wheels.sh PYTHON FOLDER [REQUIREMENT...]
#   scripts/package_gpu_wheels.sh .venv/bin/python /media/usb 'transformer-engine[pytorch,core_cu13]==2.20.2'
#   scripts/package_gpu_wheels.sh .venv/bin/python /media/usb flash-attn-4==4.0.0b36
# On the machine:
#   /media/usb/install.sh /path/to/venv
set -euo pipefail

python=$1 folder=$2
requirements=("${@:3}")
step=$(dirname "$0")/step.sh
mkdir -p "$folder/wheels" build/gpu/wheels
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

"$step" "Fetching wheels into $folder/wheels" "$python" -m pip wheel -qq --disable-pip-version-check \
    --find-links build/gpu/wheels --prefer-binary --wheel-dir "$folder/wheels" '.[dev]' "${requirements[@]}"
rm -rf "$folder/repository" && mkdir -p "$folder/repository"
git archive HEAD | tar -x -C "$folder/repository"

{
    echo '#!/usr/bin/env bash'
    echo "# Make the environment \$1 from these wheels, without a network. Needs Python $version (or PYTHON=/path/to/it)."
    echo 'set -euo pipefail'
    echo 'here=$(cd "$(dirname "$0")" && pwd)'
    echo "\"\${PYTHON:-python$version}\" -m venv \"\$1\""
    echo '"$1/bin/python" -m pip install --no-index --find-links "$here/wheels" \'
    printf '    %q' 'megatron-star[dev]' "${requirements[@]}"
    echo
    echo 'touch "$1/.installed"'
    echo 'echo "Next: cd $here/repository && make test-gpu check-gpu VENV=$1"'
} >"$folder/install.sh"
chmod +x "$folder/install.sh"
du -sh "$folder"
