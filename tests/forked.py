"""Runs of train.py's command as processes of their own, in which something goes wrong at a chosen moment.

A run is a fork of this process: it starts in no time, and may be killed. The moments are what it does, one event after
the other: an optimizer step, a batch put together, a logged line, a flush or a rename of a file.
"""

import faulthandler
import gc
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import train as train_module
from data import batching
from training import recorder
from training.command_line import run_command
from training.config import parse_command_line
from training.run_folder import RunFolder

STUCK_SECONDS = 240
"""A fork that takes longer waits for what will not come; none takes a tenth of it."""


def end_if_stuck() -> None:
    """In a fork whose stderr is a file: rather than wait for ever, tell where each thread stands, and end."""
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)


def fail_if_stuck(err: str) -> None:
    """In the process that made the fork, with what that wrote to stderr."""
    if "Timeout (" in err:
        raise AssertionError(f"a fork was stuck:\n{err}")


def die(_event: str) -> None:
    """What a power cut does to a process, or a kernel that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


class Moments:
    """Counts events; before each from number `at` on, `strike` is called with its name."""

    def __init__(self, report: Callable[[str], None], at: int, strike: Callable[[str], None]) -> None:
        self.report, self.at, self.strike = report, at, strike
        self.count, self._striking = 0, False

    def __call__(self, name: str) -> None:
        if self._striking:  # what a strike does is no event
            return
        self.report(name)
        self.count += 1
        if 0 <= self.at < self.count:
            self._striking = True
            try:
                self.strike(name)
            finally:
                self._striking = False

    def watch(self, owner: object, attribute: str) -> None:
        """Make an event of each call."""
        real = getattr(owner, attribute)

        def watched(*arguments, **options):
            self(attribute)
            return real(*arguments, **options)

        setattr(owner, attribute, watched)


@dataclass(frozen=True)
class Ended:
    """How a run in a fork ended."""

    code: int
    """The exit code; the signal that ended it as a negative number."""
    events: list[str]
    steps: int
    """Optimizer steps that were made."""
    out: str
    err: str

    @property
    def one_line(self) -> bool:
        """Whether it gave up with one clear line."""
        return self.code > 0 and self.err.startswith("error: ") and self.err.count("\n") == 1


def run_forked(
    arguments: list[object],
    at: int = -1,
    strike: Callable[[str], None] = die,
    prepare: Callable[[Moments], None] = lambda _: None,
) -> Ended:
    """Run train.py's command with `strike` from its event number `at` on; `prepare` is called in the fork first."""
    with tempfile.TemporaryDirectory() as folder:
        seen, out, err = (Path(folder, name) for name in ("seen", "out", "err"))
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                sys.stdout, sys.stderr = out.open("w", buffering=1), err.open("w", buffering=1)
                end_if_stuck()
                gc.freeze()  # or each collection goes through, and so copies, all that the libraries have made
                log = os.open(seen, os.O_CREAT | os.O_WRONLY | os.O_APPEND)  # at once: a killed process flushes nothing
                moments = Moments(lambda name: os.write(log, f"{name}\n".encode()), at, strike)
                # Drawing takes longer than the training, and is not resumed but done again.
                recorder.draw_plots = lambda folder: None
                recorder.write_html_report = lambda folder: None
                real_step = train_module.train_step

                def train_step(*step_arguments):
                    loss = real_step(*step_arguments)
                    moments.report("step made")
                    return loss

                train_module.train_step = train_step
                for owner, attribute in (
                    (train_module, "train_step"),
                    (batching, "collate"),
                    (RunFolder, "log"),
                    (os, "fsync"),
                    (Path, "rename"),
                    (Path, "replace"),
                ):
                    moments.watch(owner, attribute)
                prepare(moments)
                code = run_command(lambda: train_module.train(parse_command_line([str(one) for one in arguments])))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        lines, told, complained = (path.read_text() if path.exists() else "" for path in (seen, out, err))
    fail_if_stuck(complained)
    events = lines.splitlines()
    steps = events.count("step made")
    return Ended(os.waitstatus_to_exitcode(status), [e for e in events if e != "step made"], steps, told, complained)


class Forked:
    """What subprocess.Popen([python, script, *arguments]) is, made by a fork of this process, with its imports."""

    def __init__(self, command: list[str], stdout: BinaryIO, stderr: int, env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code: object = 99
        try:
            for number in (1, 2):
                os.dup2(stdout.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            end_if_stuck()
            gc.freeze()
            os.environ.clear()
            os.environ.update(env)
            sys.argv = command[1:]
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code if isinstance(code, int) else int(code is not None))

    def poll(self) -> int | None:
        """The exit code, or None."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        """The exit code."""
        return self._wait(0)

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def outcome(folder: Path) -> tuple[dict, list[dict], bytes]:
    """Everything that a run leaves behind, except times, memory and the name of its folder."""
    report = json.loads((folder / "report.json").read_text())
    for name in ("train_seconds", "seconds", "peak_memory_bytes", "test_texts_per_second"):
        del report[name]
    for name in ("output", "resume", "overwrite"):
        del report["config"][name]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    adapters = sorted((folder / "adapter").rglob("adapter_model.safetensors"))
    return report, lines, b"".join(path.read_bytes() for path in adapters)
