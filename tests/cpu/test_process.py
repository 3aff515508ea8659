"""Settings of the process: freed memory is kept, oneDNN is used where it is exact, and imports change nothing."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from cpu.process import allow_onednn

FAULTS = """
import resource, sys, torch
from cpu.process import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(20):  # until a hole is large enough for a tensor and what its alignment needs
    torch.ones(1 << 24)  # 64 MiB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how, **settings):
    """Pages asked for while five tensors of 64 MiB are made and freed, one after the other."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | settings
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc's settings are those of glibc")
def test_a_large_tensor_is_made_of_the_pages_of_one_before():
    assert faults("kept") < 50 < 5 * 32 <= faults("given back")  # pages are of 4 KiB, huge ones of 2 MiB
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="131072") >= 5 * 32  # the user's own setting holds


@pytest.fixture
def memory(monkeypatch):
    """The module in an environment without settings of malloc."""
    from cpu import process

    for setting in process._MALLOC_SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    return process


def test_elsewhere_nothing_is_changed(memory, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: pytest.fail("looked for glibc"))
    memory.keep_freed_memory()


def test_another_library_of_linux_is_not_asked(memory, monkeypatch):
    class Musl:
        def mallopt(self, *_):
            pytest.fail("numbers of glibc given to another malloc")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Musl())
    memory.keep_freed_memory()


@pytest.fixture
def matmul():
    """torch's setting, restored afterwards."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    yield setting
    setting.fp32_precision = before


def test_onednn_is_allowed_and_products_stay_exact(matmul):
    if torch.backends.mkldnn.is_available() and not torch.cpu.get_capabilities().get("amx_tile", False):
        allow_onednn()
        assert matmul.fp32_precision == "bf16"
    torch.manual_seed(0)
    a, b = torch.randn(384, 64, 48), torch.randn(384, 48, 64)
    exact = a.double() @ b.double()
    assert ((a @ b).double() - exact).abs().max() < 1e-6 * exact.abs().max()  # bfloat16 would be off by 4e-3


def test_a_processor_that_rounds_keeps_blas(matmul, monkeypatch):
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a.bfloat16(), b.bfloat16()).float())
    allow_onednn()
    assert matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("missing", ["matrix units", "oneDNN", "a torch that can tell"])
def test_matrix_units_and_builds_without_onednn_keep_blas(matmul, monkeypatch, missing):
    if missing == "oneDNN":
        monkeypatch.setattr(type(torch.backends.mkldnn), "is_available", lambda _self: False)
    elif missing == "matrix units":
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    allow_onednn()
    assert matmul.fp32_precision == "ieee"


def test_importing_the_libraries_changes_nothing():
    code = (
        "import torch; before = torch.backends.mkldnn.matmul.fp32_precision; import lora, roberta, sys; "
        "assert torch.backends.mkldnn.matmul.fp32_precision == before; assert 'cpu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
