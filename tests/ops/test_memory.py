"""What is freed stays with the process: no page of a second tensor is asked for again."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from ops.memory import keep_freed_memory
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
    from ops import memory

    for setting in memory._SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    return memory


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
