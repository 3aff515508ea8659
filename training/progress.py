"""Console output during a run: a progress bar in a terminal, one line per tenth of the run in a pipe or in CI."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

from tqdm import tqdm


def say(line: str = "") -> None:
    """Print a line and flush it, above the progress bar if there is one; what stdout can't encode as \\uXXXX."""
    encoding = sys.stdout.encoding or "utf-8"  # None of a StringIO
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
    sys.stdout.flush()


def program(name: str) -> str:
    """The start of a command to copy: this interpreter and train.py or evaluate.py, relative where that is shorter."""
    paths = (sys.executable, str(Path(__file__).resolve().parents[1] / name))
    return " ".join(shlex.quote(min(path, os.path.relpath(path), key=len)) for path in paths)


class Progress:
    """Progress over all optimizer steps of a run: loss, learning rate, tokens per second, time left."""

    def __init__(self, total_steps: int, done: int = 0, shown: bool = True) -> None:
        self.total_steps = total_steps
        self.done = done
        self._done_before = done
        self._terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=done, unit="step", disable=not self._terminal, dynamic_ncols=True)
        self._training_seconds = 0.0
        self._tokens = 0
        self._since = time.perf_counter()

    def resume_clock(self) -> None:
        """Restart the clock after an evaluation, whose time does not count for the tokens per second."""
        self._since = time.perf_counter()

    def update(self, steps: int, tokens: int, loss: float, learning_rate: float) -> float:
        """Report `steps` more steps that read `tokens` real tokens; returns training tokens per second so far."""
        now = time.perf_counter()
        self._training_seconds += now - self._since
        self._since = now
        self._tokens += tokens
        rate = self._tokens / max(self._training_seconds, 1e-9)
        before, self.done = self.done, self.done + steps
        if self._terminal:
            self._bar.set_postfix_str(f"loss {loss:.4f}, lr {learning_rate:.2e}, {rate:,.0f} tokens/s", refresh=False)
            self._bar.update(steps)
        elif 10 * before // self.total_steps != 10 * self.done // self.total_steps:
            left = self._training_seconds / (self.done - self._done_before) * (self.total_steps - self.done)
            say(
                f"step {self.done:>5}/{self.total_steps}  loss {loss:.4f}  lr {learning_rate:.2e}  "
                f"{rate:,.0f} tokens/s  {minutes(left)} left"
            )
        return rate

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def minutes(seconds: float) -> str:
    """A duration as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
