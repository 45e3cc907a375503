"""The kernel is chosen once: by name, or by device, dtype, head size and what is installed."""

import sys
from importlib import metadata
from types import ModuleType

import kernel_stubs
import pytest
import torch
import torch_kernel_stubs

from megatron_star.attention.adapter import LoadedKernel
from megatron_star.attention.kernels import AUTO, KERNEL_NAMES, KERNELS, select_kernel
from megatron_star.attention.window_kernel import WindowKernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this look like a machine with these packages and such a GPU."""

    def pretend(*packages: str, capability: tuple[int, int] = (10, 0)) -> None:
        def version(name: str) -> str:
            if name not in ("torch", *packages):
                raise metadata.PackageNotFoundError(name)
            return "1.0"

        monkeypatch.setattr("megatron_star.attention.adapter.metadata.version", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        kernel_stubs.install_library_stubs(monkeypatch)

    with torch_kernel_stubs.flash_attn_3_operator():
        yield pretend


def chosen(device=CUDA, dtype=torch.bfloat16, head_size=128, name="auto", **further) -> str:
    return select_kernel(name, device=device, dtype=dtype, head_size=head_size, **further).name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [7, 64, 512])
def test_a_cpu_gets_torchs_kernel(dtype, head_size):
    assert chosen(CPU, dtype, head_size) == "torch-cpu"


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        ([], "torch-flash"),
        (["flash-attn"], "flash-attn-2"),
        (["flash-attn-4"], "flash-attn-4"),
        (["transformer-engine"], "torch-flash"),
        (["transformer-engine", "flash-attn"], "flash-attn-2"),
    ],
)
def test_a_gpu_gets_the_best_kernel_that_is_installed(machine, packages, expected):
    machine(*packages)
    assert chosen() == expected


def test_windows_go_to_the_first_kernel_that_has_them(machine):
    machine("fa3-fwd", "flash-attn", capability=(9, 0))
    options = {"device": CUDA, "dtype": torch.bfloat16, "head_size": 128}
    assert isinstance(select_kernel("auto", **options), LoadedKernel)
    both = select_kernel("auto", window=1024, **options)
    assert (both.name, both.full.name, both.windows.name) == ("flash-attn-3", "flash-attn-3", "flash-attn-2")
    assert isinstance(select_kernel("flash-attn-3", window=1024, **options), LoadedKernel)
    machine("fa3-fwd", capability=(9, 0))
    assert select_kernel("auto", window=1024, **options).windows.name == "torch-flash"
    assert isinstance(select_kernel("auto", window=1024, softcap=30.0, **options), LoadedKernel)
    machine("flash-attn", capability=(9, 0))
    assert isinstance(select_kernel("auto", window=1024, **options), LoadedKernel)


def test_only_rows_with_a_window_go_to_the_kernel_for_windows():
    calls = []

    def noted(name):
        return lambda *_, window, **__: calls.append((name, window))

    both = WindowKernel(noted("full"), noted("windows"))
    for rows, window in ((5, None), (1, 3), (5, 3)):
        tensors = torch.zeros(3, rows, 1, 2, 8)
        both(*tensors, causal=True, softmax_scale=1.0, window=window)
    assert calls == [("full", None), ("full", 3), ("windows", 3)]


def test_auto_goes_by_dtype_head_size_and_gpu(machine):
    machine("flash-attn-4")
    assert chosen(dtype=torch.float32) == "torch-efficient"
    assert chosen(head_size=256) == "torch-flash"
    machine("flash-attn-4", capability=(9, 0))
    assert chosen() == "torch-flash"
    machine("fa3-fwd", "flash-attn", capability=(9, 0))
    assert chosen() == "flash-attn-3"
    assert chosen(dtype=torch.float16) == "flash-attn-2"
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        machine("fa3-fwd", "flash-attn", capability=other)
        assert chosen() == "flash-attn-2"
    machine("flash-attn-4", capability=(7, 5))
    assert chosen(dtype=torch.float16) == "torch-efficient"


def test_auto_takes_a_kernel_that_has_a_soft_cap(machine):
    machine("flash-attn-4")
    assert chosen(softcap=50.0) == "flash-attn-4"
    machine("fa3-fwd", "flash-attn", capability=(9, 0))
    assert chosen(softcap=50.0) == "flash-attn-3"
    assert chosen(softcap=50.0, dtype=torch.float16) == "flash-attn-2"
    assert chosen(CPU, softcap=50.0) == "torch-cpu"
    machine()
    with pytest.raises(ValueError, match="torch-flash: it has no soft cap; torch-efficient: it has no soft"):
        chosen(softcap=50.0)


@pytest.mark.parametrize("name", [name for name, info in KERNELS.items() if not info.load_capped])
def test_a_kernel_without_a_soft_cap_is_refused_where_one_is_needed(machine, name):
    machine("transformer-engine")
    assert chosen(name=name) == name
    with pytest.raises(ValueError, match=f"'{name}' cannot be used here: it has no soft cap"):
        chosen(name=name, softcap=50.0)


def test_the_head_size_of_values_has_the_same_limit(machine):
    machine()
    assert chosen(head_size=192, value_size=128) == "torch-flash"
    assert chosen(head_size=192, value_size=512) == "torch-efficient"
    with pytest.raises(ValueError, match="head sizes up to 256 that 8 divides, not 20"):
        chosen(name="torch-flash", value_size=20)


def test_where_nothing_fits_each_reason_is_named(machine):
    machine()
    with pytest.raises(ValueError, match="torch-flash: it takes head sizes up to 256 that 8 divides, not 20"):
        chosen(head_size=20)
    assert set(AUTO) <= set(KERNEL_NAMES)


def test_an_unknown_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match="'flashy'.*auto, torch-cpu"):
        chosen(name="flashy")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash-attn-2", "needs flash-attn, which is not installed: pip install"),
        ("flash-attn-2-varlen", "needs flash-attn, which is not installed: pip install"),
        ("flash-attn-3", "needs fa3-fwd, which is not installed: pip install"),
        ("flash-attn-4", "needs flash-attn-4, which is not installed: pip install"),
        ("transformer-engine", "needs transformer-engine, which is not installed: see docs/kernels.md"),
    ],
)
def test_a_missing_kernel_says_how_to_install_it(machine, name, message):
    machine(capability=(9, 0) if name == "flash-attn-3" else (10, 0))
    with pytest.raises(ValueError, match=message):
        chosen(name=name)


@pytest.mark.parametrize("name", [name for name, info in KERNELS.items() if info.device_type == "cuda"])
def test_a_kernel_is_refused_where_it_cannot_run(machine, name):
    packages = {info.distribution for info in KERNELS.values()}
    machine(*packages, capability=(9, 0) if KERNELS[name].below_capability <= (10, 0) else (10, 0))
    assert chosen(name=name) == name
    with pytest.raises(ValueError, match="runs on cuda, not on cpu"):
        chosen(CPU, name=name)
    if torch.float32 not in KERNELS[name].dtypes:
        with pytest.raises(ValueError, match="computes in (float16 or )?bfloat16, not in float32"):
            chosen(dtype=torch.float32, name=name)
        machine(*packages, capability=(7, 0))
        with pytest.raises(ValueError, match="compute capability (8|9|10).0 or newer"):
            chosen(name=name)


def test_flash_attention_3_is_refused_on_gpus_newer_than_its_code(machine):
    machine("fa3-fwd", capability=(10, 3))
    with pytest.raises(ValueError, match="compute capability below 10.0, not 10.3"):
        chosen(name="flash-attn-3")


@pytest.mark.parametrize("name", ["auto", "flash-attn-2"])
def test_a_broken_installation_is_an_error_even_if_another_kernel_would_do(machine, monkeypatch, name):
    machine("flash-attn")
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # without its functions
    with pytest.raises(ImportError, match="flash-attn is installed but broken: cannot import"):
        chosen(name=name)
