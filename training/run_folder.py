"""The run folder: where a run writes what, and when it may be written at all.

config.toml      the settings that were used
labels.json      names of the classes, in the order of the logits
metrics.jsonl    a line a logged step, a line an evaluation
adapter/         the best adapter so far: peft's two files and the tokenizer
checkpoint/      all that an exact resume needs, while the run is not finished
report.json      final scores, counts, times
report.html      all of it on one page
README.md        the model card: what it is, how good, its limits, how to load it
plots/           the curves as images
tensorboard/     what metrics.jsonl holds, for TensorBoard, if asked for
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

from lora.files import atomic_write
from training.config import RunConfig, read_config, write_config
from training.errors import ConfigError

# Settings that decide where and how often something is written, and nothing of what is computed.
_HARMLESS = frozenset(
    "output overwrite resume train.tensorboard train.checkpoint_minutes train.checkpoint_steps "
    "train.checkpoint_keep".split()
)


class RunFolder:
    """A run's files by name.

    Of several processes one writes; for the others (`writes=False`) every method that would write does nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.labels = self.path / "labels.json"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoint"
        self.report = self.path / "report.json"
        self.html = self.path / "report.html"
        self.card = self.path / "README.md"
        self.plots = self.path / "plots"
        self.writes = writes
        self._board: Any = None

    def check_free(self, overwrite: bool) -> None:
        """Raise ConfigError if the folder exists and may not be replaced. Nothing is changed."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not overwrite:
            raise ConfigError(
                f"{self.path} exists; add --overwrite to replace it, or --output FOLDER to write elsewhere"
            )
        if not self.config.is_file():
            # Something else than a run: not ours to remove, whatever was asked for.
            raise ConfigError(f"{self.path} is not a run folder (no config.toml); give another --output")

    def check_same_run(self, config: RunConfig) -> None:
        """Raise ConfigError that names the settings in which `config` differs from the run that is in the folder.

        Settings that decide nothing but where and how often something is written may differ.
        """
        changed = {
            name: there
            for name, (there, _) in changed_settings(read_config(self.config), config).items()
            if name not in _HARMLESS
        }
        if changed:
            shown = ", ".join(f"{name} (there: {there!r})" for name, there in changed.items())
            raise ConfigError(f"--resume: {self.path} was run with other settings: {shown}; give those, or --overwrite")

    def is_complete(self) -> bool:
        """Whether the run was finished: report.json says so."""
        try:
            return bool(json.loads(self.report.read_text(encoding="utf-8"))["complete"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def create(self, config: RunConfig, label_names: tuple[str, ...], replace: bool) -> None:
        """Make the folder anew, with the settings and labels of this run.

        It is made under another name and renamed, and so is the one it replaces: whenever the process ends, there is
        either no folder of this name or a whole one, in which a run can be resumed.
        """
        if not self.writes:
            return
        self.check_free(replace)
        path = self.path.absolute()
        new, old = (path.with_name(f".{path.name}.{state}") for state in ("new", "old"))
        for left_over in (new, old):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            write_config(config, new / self.config.name)
            names = json.dumps(label_names, ensure_ascii=False) + "\n"
            (new / self.labels.name).write_text(names, encoding="utf-8")
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def open_board(self, step: int) -> None:
        """From now on `log` writes for TensorBoard as well; of what is there, events after `step` are hidden."""
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter  # there if `check_board` passed

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl, and to TensorBoard's events if they are open."""
        if not self.writes:
            return
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self._board is not None:
            part = values.get("split", "training")
            for name in set(values) - {"step", "epoch", "split"}:
                self._board.add_scalar(f"{part}/{name}", values[name], values["step"])
            self._board.flush()

    def cut_metrics(self, size: int) -> None:
        """Forget what was logged after a checkpoint: it will be logged again."""
        if self.writes and self.metrics.is_file():
            os.truncate(self.metrics, size)

    def remove_checkpoints(self) -> None:
        """Remove checkpoint/."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_report(self, report: dict[str, Any]) -> None:
        """Write report.json, whole or not at all."""
        if not self.writes:
            return
        with atomic_write(self.report) as part:
            part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def read_labels(self) -> tuple[str, ...]:
        """The class names. Raises ConfigError if the file is missing or broken."""
        try:
            names = json.loads(self.labels.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{self.labels}: can't be read ({error}); is {self.path} a run folder?") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{self.labels}: must be a list of names")
        return tuple(names)


def changed_settings(there: RunConfig, wanted: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ, by dotted name: the value there and the wanted one."""

    def flat(section: Any, above: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            found |= (
                flat(value, f"{above}{field.name}.") if dataclasses.is_dataclass(value) else {above + field.name: value}
            )
        return found

    old, new = flat(there, ""), flat(wanted, "")
    return {name: (old[name], new[name]) for name in new if old[name] != new[name]}


def check_board() -> None:
    """Raise ConfigError if TensorBoard's writer is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("train.tensorboard needs the extra: pip install -e '.[tensorboard]'")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. Raises ValueError if one is not JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
