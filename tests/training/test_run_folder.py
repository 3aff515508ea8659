"""A run folder is complete or absent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora.config import LoRAConfig
from training import run_folder as module
from training.config import RunConfig, read_config
from training.errors import ConfigError
from training.run_folder import RunFolder


@pytest.fixture
def failing(monkeypatch):
    """Settings are written partly, then the disk is full."""

    def write(config, path):
        path.write_text("output = ")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_config", write)


def test_a_folder_that_can_not_be_written_is_absent(tmp_path, failing):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(OSError, match="space"):
        folder.create(RunConfig(), ("a", "b"), replace=False)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_was_to_be_replaced_stays(tmp_path, monkeypatch, request):
    folder = RunFolder(tmp_path / "run")
    folder.create(RunConfig(output="first"), ("a", "b"), replace=False)
    folder.log(step=1)
    request.getfixturevalue("failing")
    with pytest.raises(OSError, match="space"):
        folder.create(RunConfig(output="second"), ("a", "b"), replace=True)
    assert read_config(folder.config).output == "first" and folder.metrics.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".run.new").mkdir()
    (tmp_path / ".run.new" / "config.toml").write_text("output = ")
    (tmp_path / "run").mkdir()  # empty: free to be used
    folder = RunFolder(tmp_path / "run")
    folder.create(RunConfig(output="mine"), ("a", "b"), replace=False)
    assert read_config(folder.config).output == "mine" and folder.read_labels() == ("a", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def create_and_be_killed(folder, output, at):
    """Create the folder in a fork that is killed before its `at`-th file operation; returns whether it was."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def audit(event, values):
            nonlocal seen
            if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "shutil.copytree"):
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(audit)
        folder.create(RunConfig(output=output), ("a", "b"), replace=True)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_process_killed_at_any_time_leaves_a_complete_folder_or_none(tmp_path):
    """In a separate process: a fork of a process with threads may deadlock on a lock that a thread held."""
    code = f"from pathlib import Path; from {__name__} import kill_at_each_moment as f; f(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).resolve().parents[2])


def kill_at_each_moment(tmp_path):
    kinds = set()
    for at in range(100):
        folder = RunFolder(tmp_path / str(at) / "run")
        folder.create(RunConfig(output="first"), ("a", "b"), replace=False)
        killed = create_and_be_killed(folder, "second", at)
        there = folder.path.exists()
        if there:
            assert folder.read_labels() == ("a", "b")
        kinds.add(read_config(folder.config).output if there else "none")
        if not killed:
            break
    assert not killed and kinds == {"first", "none", "second"}


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (LoRAConfig(), LoRAConfig(rank_pattern={"query": 4})),
        (LoRAConfig(rank_pattern={"query": 4}), LoRAConfig()),
        (LoRAConfig(rank_pattern={"query": 4}), LoRAConfig(rank_pattern={"key": 4})),
    ],
)
def test_another_pattern_of_ranks_is_another_run(tmp_path, there, wanted):
    folder = RunFolder(tmp_path / "run")
    folder.create(RunConfig(lora=there), ("a", "b"), replace=False)
    folder.check_same_run(RunConfig(lora=there, output="elsewhere"))
    with pytest.raises(ConfigError, match=r"other settings: lora.rank_pattern \(there: \{.*\}\); give those"):
        folder.check_same_run(RunConfig(lora=wanted))
