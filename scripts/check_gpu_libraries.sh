#!/usr/bin/env bash
# Check the kernel libraries that need a GPU as far as a machine without one can: TransformerEngine is built and imported,
# FlashAttention 3 and 4 are installed, 4 compiles, the source of FlashAttention 2 is fetched; then the tests that look at them.
# The environments lie on top of $1, so that torch exists once. What is built is kept in build/gpu, and built once.
#
# usage: check_gpu_libraries.sh VENV     (CUDA's headers in /usr/local/cuda; 20 minutes of a core the first time)
set -euo pipefail

readonly te=2.20.2 fa2=2.8.3.post2 fa3=0.0.3 fa4=4.0.0b36
venv=$1
step=$(dirname "$0")/step.sh
work=build/gpu
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p $work/wheels

# An environment named $1 that also sees the packages of $venv.
layer() {
    [[ -e $work/$1/.layered ]] && return
    rm -rf "${work:?}/$1"
    "$venv/bin/python" -m venv "$work/$1"
    local own
    own=$("$work/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$site" >"$own/below.pth"
    # TransformerEngine looks for CUDA's libraries beside itself.
    mkdir -p "$own/nvidia"
    find "$site/nvidia" -mindepth 1 -maxdepth 1 -exec ln -sfnt "$own/nvidia" {} +
    touch "$work/$1/.layered"
}
install() {
    local pip=$work/$1/bin/python
    "$pip" -m pip install -qq --disable-pip-version-check --no-build-isolation --find-links $work/wheels "${@:2}"
}

layer te
if ! compgen -G "$work/wheels/transformer_engine_torch-$te-*.whl" >/dev/null; then
    install te ninja pybind11 wheel
    PATH=$PWD/$work/te/bin:$PATH NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
        CPLUS_INCLUDE_PATH=/usr/local/cuda/include "$step" "Building TransformerEngine $te" \
        $work/te/bin/python -m pip wheel -qq --disable-pip-version-check --no-build-isolation --no-deps \
        --wheel-dir $work/wheels transformer-engine-torch==$te
fi
export -f install && export work
"$step" "Installing TransformerEngine" bash -c "install te 'transformer-engine[pytorch,core_cu13]==$te'"
layer fa3
"$step" "Installing FlashAttention 3" bash -c "install fa3 fa3-fwd==$fa3"
layer fa4
"$step" "Installing FlashAttention 4" bash -c "install fa4 flash-attn-4==$fa4"
if [[ ! -d $work/flash_attn-$fa2 ]]; then
    "$step" "Fetching the source of FlashAttention 2" $work/te/bin/python -m pip download -qq --no-deps \
        --disable-pip-version-check --no-build-isolation --no-binary :all: --dest $work flash-attn==$fa2
    tar -xzf $work/flash_attn-$fa2.tar.gz -C $work
fi

check() { PYTHONPATH=.:tests${3:+:$3} "$1" -m pytest --disable-warnings -rs -k "$2" "${@:4}"; }
check $work/te/bin/python transformer "" tests/unit/test_kernel_signatures.py tests/unit/test_kernel_libraries.py
check $work/fa3/bin/python "flash_attention_3" "" tests/unit/test_kernel_libraries.py
check $work/fa4/bin/python "flash-attn-4 or flash_attention_4" "" \
    tests/unit/test_kernel_signatures.py tests/unit/test_kernel_libraries.py
# FlashAttention 2 cannot be imported without its extension, so nothing but the test that reads its source may run.
check "$venv/bin/python" flash_attn_interface $work/flash_attn-$fa2 --noconftest tests/unit/test_kernel_signatures.py
