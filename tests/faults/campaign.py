"""Inject faults into runs, resume the runs, and count what is lost: `make faults`.

    python -m tests.faults.campaign [WORD ...]      # all faults, or those whose name contains one of the words

In each trial one fault occurs in a tiny run (with dropout, EDA, accumulation and a checkpoint every five steps); then
the fault is fixed, and the same command runs again with --resume. The run has survived if it first ended by a signal or
with a one-line error, and then with the same bits as an undisturbed run (weights, metrics, report), without leftover
files in its folder. The work lost is the number of optimizer steps that were repeated.

A full or read-only disk is real where a user may mount a file system (Linux with user namespaces): the run writes to a
small tmpfs. Elsewhere errors are simulated at the same events.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import write_tiny_checkpoint, write_tiny_config, write_tiny_data
from tests.forked import Ended, Moments, die, outcome, run_forked
from tests.training.test_distributed import forks, run_train
from training import checkpoint
from training.command_line import EXIT_LOST

EVERY = 5  # steps between two checkpoints
OPTIONS = f"""
--data.augmentation.n-aug 1 --train.accumulation-steps 2 --train.batch-size 7 --train.epochs 2 --train.log-every 4
--train.checkpoint-steps {EVERY} --train.eval-batch-size 20 --lora.dropout 0.2 --train.device cpu --resume
""".split()
OWN_MOUNTS = "LORABERTA_OWN_MOUNTS"  # set in a process with a mount namespace of its own


@dataclass(frozen=True)
class Trial:
    """The result of one run with one fault."""

    problem: str
    """Why it has not survived; empty if it has."""
    lost: int
    """Optimizer steps that were repeated."""


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    how: str
    """How it is caused, or why it can't be tried here."""
    trials: list[Callable[[], Trial]]
    allowed: int = EVERY
    """Maximum number of lost steps: those since the last intact checkpoint."""


class Campaign:
    """The tiny model and data, the disk of the runs, and the events and outcome of an undisturbed run."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        import datasets  # noqa: F401  imported now, once, instead of in every fork
        import sklearn.metrics  # noqa: F401

        self.disk, self.mounted = folder / "disk", mounted
        self.output, self._filler = self.disk / "run", self.disk / "filler"
        for path in (self.disk, folder / "tiny"):
            path.mkdir()
        if mounted:
            self._mount("-t", "tmpfs", "-o", "size=4m", "none")
        write_tiny_data(folder)
        self._config = write_tiny_config(write_tiny_checkpoint(folder / "tiny"), folder)
        self.undisturbed = self.run(prepare=self.watch_disk)
        assert self.undisturbed.code == 0, self.undisturbed.err
        self.expected = outcome(self.output)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", self.disk], check=True)

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, self.disk], check=True)

    def run(self, at: int = -1, strike: Callable[[str], None] = die, prepare: Callable = lambda _: None) -> Ended:
        def prepared(moments: Moments) -> None:
            os.environ["LORABERTA_CACHE"] = str(self.disk / "cache")
            prepare(moments)

        return run_forked([self._config, *OPTIONS, "--output", self.output], at, strike, prepared)

    def watch_disk(self, moments: Moments) -> None:
        """Record everything that writes to the disk of the runs as an event."""

        def audit(event: str, values: tuple) -> None:
            to_write = event == "open" and (values[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            changes = to_write or event in ("os.mkdir", "os.rename", "os.truncate")
            if changes and str(values[0]).startswith(str(self.disk)):
                name = Path(values[0]).name
                prefix = re.match(r"tmp|step-|\.part-", name)  # the rest differs from run to run
                moments(f"{event} {prefix[0] if prefix else name}")

        sys.addaudithook(audit)
        moments.watch(checkpoint, "save_file")  # not written by Python

    def moments(self, each: int, wanted: Callable[[str], bool] = lambda _: True) -> list[int]:
        """`each` moments of every kind of event: the first, the last, and some between."""
        kinds: dict[str, list[int]] = {}
        for number, name in enumerate(self.undisturbed.events):
            if wanted(name):
                kinds.setdefault(name, []).append(number)
        chosen = (
            numbers[round(i * (len(numbers) - 1) / (each - 1))] for numbers in kinds.values() for i in range(each)
        )
        return sorted(set(chosen))

    def trial(
        self,
        at: int,
        strike: Callable[[str], None] = die,
        prepare: Callable[[Moments], None] = lambda _: None,
        between: Callable[[], None] = lambda: None,
        says: str = "",
    ) -> Trial:
        """A run with a fault at event `at`, then fixed and resumed. Its error message contains `says`."""

        def prepared(moments: Moments) -> None:
            self.watch_disk(moments)
            prepare(moments)

        self.repair()
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.disk / "cache", ignore_errors=True)
        first = self.run(at, strike, prepared)
        self.repair()
        between()
        second = self.run()
        problems = self.judge(second)
        if len(first.events) <= at:
            problems.append("the fault never occurred")
        if not (first.code in (0, -signal.SIGKILL) or (first.one_line and says in first.err)):
            problems.append(f"ended with code {first.code} and {first.err[-300:]!r}")
        struck = self.undisturbed.events[at] if at < len(self.undisturbed.events) else f"event {at}"
        made = first.steps + second.steps if second.code == 0 else first.steps + self.undisturbed.steps
        return Trial(f"{struck}: {'; '.join(problems)}" if problems else "", made - self.undisturbed.steps)

    def judge(self, ended: Ended) -> list[str]:
        """The problems of the resumed run."""
        if ended.code != 0:
            return [f"can't resume: code {ended.code}, {ended.err[-300:]!r}"]
        left = [*self.disk.glob(".run.*"), *self.output.glob("checkpoint"), *self.output.rglob("*.part*")]
        problems = [f"leftover files: {', '.join(sorted({path.name for path in left}))}"] if left else []
        return problems + ([] if outcome(self.output) == self.expected else ["not the bits of an undisturbed run"])

    # --- the faults -----------------------------------------------------------------------------------------------

    def fill(self, event: str) -> None:
        """Fill the disk; without a mount, raise the error of a full disk."""
        if self.mounted:
            with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        elif is_write(event) or event == "fsync":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), event)

    def forbid(self, _event: str = "") -> None:
        """Make the disk read-only, as Linux does after disk errors; without a mount, its folders."""
        if self.mounted:
            # Fails while a file is open for writing; the next event tries again.
            subprocess.run(["mount", "-o", "remount,ro", self.disk], capture_output=True)
        else:
            for folder in (path for path in [self.disk, *self.disk.rglob("*")] if path.is_dir()):
                folder.chmod(0o555)

    def repair(self) -> None:
        """Undo `fill` and `forbid`."""
        if self.mounted:
            self._mount("-o", "remount,rw")
        else:
            self.disk.chmod(0o755)
            for folder in (path for path in self.disk.rglob("*") if path.is_dir()):
                folder.chmod(0o755)
        self._filler.unlink(missing_ok=True)

    def damage(self, kind: str, file: str) -> Callable[[], None]:
        """Flip a bit of a file of the newest checkpoint, cut it in half, or remove it."""

        def between() -> None:
            path = max((self.output / "checkpoint").glob("step-*")) / file
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.unlink()
            if kind != "gone":
                path.write_bytes(content if kind == "flip" else content[: len(content) // 2])

        return between

    def of_next_year(self) -> None:
        """Set file times a year ahead, in reverse order."""
        files = sorted(self.output.rglob("*"), key=lambda path: path.stat().st_mtime_ns)
        for number, path in enumerate(files):
            os.utime(path, (time.time(), time.time() + 31e6 - number))

    def lose_process(self, rank: int, step: int) -> Trial:
        """Kill one of two processes before a step, then resume both."""

        def die_there(now: int) -> None:
            if (now, int(os.environ["RANK"])) == (step, rank):
                die("")

        def both(name: str, act: Callable[[int], None] = lambda _: None) -> tuple[list[int], list[tuple]]:
            def work(_rank: int) -> tuple[int, dict]:
                os.environ["LORABERTA_CACHE"] = str(self.disk / "cache")
                return run_train([self._config, *OPTIONS, "--output", self.disk / name], double=False, act=act)

            return forks(2, work, self.disk.parent / "seen")

        if not (self.disk / "both").exists():
            codes, _ = both("both")
            assert codes == [0, 0]
        self.repair()
        shutil.rmtree(self.output, ignore_errors=True)
        codes, results = both("run", die_there)
        problems = [] if codes[rank] == -signal.SIGKILL and codes[1 - rank] == EXIT_LOST else [f"ended with {codes}"]
        error = results[1 - rank][2]
        if not (error.startswith("error: ") and error.count("\n") == 1):
            problems.append(f"no one-line error, but {error[-300:]!r}")
        codes, results = both("run")
        if codes != [0, 0]:
            return Trial(f"can't resume: {codes}, {results[0][2][-300:]!r}", step - 1)
        if outcome(self.output) != outcome(self.disk / "both"):
            problems.append("not the bits of an undisturbed run")
        return Trial("; ".join(problems), step - 1 + len(results[0][0]["rows"]) - self.undisturbed.steps)

    # --- the table ------------------------------------------------------------------------------------------------

    def faults(self) -> Iterator[Fault]:
        """The rows of the table."""
        anything = self.moments(3)
        late = max(i for i, name in enumerate(self.undisturbed.events) if name == "log") - 8  # in the second epoch

        yield Fault("killed (SIGKILL) in each phase", "real", [lambda at=at: self.trial(at) for at in anything])

        writes = [i for i, name in enumerate(self.undisturbed.events) if is_write(name)]
        full = [lambda at=at: self.trial(at, self.fill, says="the disk is full") for at in writes]
        yield Fault("disk full at each write", "a tmpfs" if self.mounted else "simulated", full)

        how, moments = "tmpfs, remounted" if self.mounted else "permissions", [0, *self.moments(2, is_write)]
        forbidden = [lambda at=at: self.trial(at, self.forbid, says="can't be written") for at in moments]
        if not self.mounted and os.geteuid() == 0:
            how, forbidden = "root can write anywhere, and can't mount here", []
        yield Fault("folder is or becomes read-only", how, forbidden)

        starve = (no_cpu_memory, no_python_memory, no_gpu_memory)
        starved = [
            lambda at=at, strike=starve[i % 3]: self.trial(at, strike, says="memory; free some")
            for i, at in enumerate(self.moments(2))
        ]
        yield Fault("out of memory", "simulated", starved)

        back = [lambda at=at: self.trial(at, die, clock_backwards, self.of_next_year) for at in anything[::6]]
        yield Fault("clock set back, then killed", "simulated", back)

        damaged = [
            lambda kind=kind, file=file: self.trial(late, between=self.damage(kind, file))
            for kind in ("flip", "cut", "gone")
            for file in (*checkpoint._FILES, "sha256.json")
        ]
        yield Fault("newest checkpoint damaged", "real", damaged, allowed=2 * EVERY)

        pairs = [(rank, step) for rank in (0, 1) for step in (6, 10, 20)]
        yield Fault(
            "one of two processes killed", "real", [lambda pair=pair: self.lose_process(*pair) for pair in pairs]
        )


def is_write(event: str) -> bool:
    """Whether an event needs space on the disk."""
    return event.startswith(("open", "os.mkdir", "save_file"))


def no_cpu_memory(_event: str) -> None:
    """Allocate more than torch can."""
    torch.empty(1 << 60, dtype=torch.uint8)


def no_python_memory(_event: str) -> None:
    """Python's own error."""
    raise MemoryError


def no_gpu_memory(_event: str) -> None:
    """CUDA's error."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def clock_backwards(_moments: Moments) -> None:
    """Set the clock back by another day at each reading."""
    days, real = itertools.count(), time.time
    time.time = lambda: real() - 86_400 * next(days)


def table(faults: Iterator[Fault], words: list[str]) -> tuple[int, int]:
    """Run the faults and print the results: (runs tried, runs that were lost or lost too many steps)."""
    print(f"{'fault':<32}{'by':<18}{'tried':>6}{'survived':>10}{'most steps lost':>17}{'allowed':>9}", flush=True)
    tried = lost = 0
    for fault in faults:
        if words and not any(word in fault.name for word in words):
            continue
        if not fault.trials:
            print(f"{fault.name:<32}not run: {fault.how}")
            continue
        trials = [one() for one in fault.trials]
        bad = [one for one in trials if one.problem or one.lost > fault.allowed]
        tried, lost = tried + len(trials), lost + len(bad)
        survived, worst = len(trials) - len(bad), max(one.lost for one in trials)
        print(f"{fault.name:<32}{fault.how:<18}{len(trials):>6}{survived:>10}{worst:>17}{fault.allowed:>9}")
        for one in bad:
            print(f"    LOST, {one.lost} steps: {one.problem}")
        sys.stdout.flush()  # each fork would print the buffer again
    return tried, lost


def main(words: list[str]) -> int:
    """Run the campaign; returns 1 if a run was lost or no fault was tried."""
    mounted = OWN_MOUNTS in os.environ
    with tempfile.TemporaryDirectory(prefix="loraberta-faults-") as folder:
        alone = ["unshare", "--user", "--map-root-user", "--mount"]
        if not mounted and shutil.which("unshare"):
            trial = subprocess.run([*alone, "mount", "-t", "tmpfs", "none", folder], capture_output=True)
            if trial.returncode == 0:
                again = [*alone, sys.executable, "-m", "tests.faults.campaign", *words]
                return subprocess.run(again, env=os.environ | {OWN_MOUNTS: "1"}).returncode
        torch.set_num_threads(1)  # a fork has only the thread that made it
        started = time.perf_counter()
        campaign = Campaign(Path(folder), mounted)
        try:
            print(f"a run of {campaign.undisturbed.steps} steps, a checkpoint every {EVERY} and after each epoch\n")
            tried, lost = table(campaign.faults(), words)
        finally:
            campaign.close()
    print(f"\n{tried} runs tried, {lost} lost; {time.perf_counter() - started:.0f} s")
    return 1 if lost or not tried else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
