"""The run folder: its files, and when it may be written.

config.toml      the settings that were used
labels.json      names of the classes, in the order of the logits
metrics.jsonl    one line per logged step and per evaluation
adapter/         the best adapter so far: peft's two files, config.json, the tokenizer, labels.json again, and
                 temperature.json, by which the logits are divided for probabilities
checkpoint/      what an exact resume needs, until the run is finished
report.json      final scores, counts, times
report.html      the results on one page
README.md        the model card
plots/           the curves as images
noise.json       accuracies on corrupted test texts, as evaluate.py --noise writes them
tensorboard/     the content of metrics.jsonl for TensorBoard, with train.tensorboard
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

from training.classes import read_names, write_names
from training.config import RunConfig, read_config, write_config
from training.errors import ConfigError
from training.pages import write_text_atomic

# Settings that decide where and how often something is written; they do not change what is computed.
_HARMLESS = frozenset(
    "output overwrite resume train.tensorboard train.checkpoint_minutes train.checkpoint_steps "
    "train.checkpoint_keep".split()
)


class RunFolder:
    """A run's files by name. With `writes=False` (all processes but one) the methods that write do nothing."""

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.labels = self.path / "labels.json"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.adapter_labels = self.adapter / "labels.json"
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
            raise ConfigError(f"{self.path} is not a run folder (no config.toml); give another --output")

    def check_same_run(self, config: RunConfig) -> None:
        """Raise ConfigError naming the settings in which `config` differs from the run in the folder.

        Settings that only decide where and how often something is written may differ.
        """
        changed = changed_settings(read_config(self.config), config)
        shown = ", ".join(f"{name} (there: {old!r})" for name, (old, _) in changed.items() if name not in _HARMLESS)
        if shown:
            raise ConfigError(f"--resume: {self.path} was run with other settings: {shown}; give those, or --overwrite")

    def read_report(self) -> dict[str, Any]:
        """The content of report.json. Raises OSError or ValueError, or RecursionError, if it is missing or damaged."""
        return json.loads(self.report.read_text(encoding="utf-8"))

    def is_complete(self) -> bool:
        """Whether the run is finished, according to report.json."""
        try:
            return bool(self.read_report()["complete"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def create(self, config: RunConfig, label_names: tuple[str, ...], replace: bool) -> None:
        """Create the folder with the settings and labels of this run.

        It is created under another name and then renamed, like the folder that it replaces, so that a killed process
        leaves either no folder of this name or a complete one.
        """
        if not self.writes:
            return
        self.check_free(replace)
        path = self.path.absolute()
        new, old = (path.with_name(f".{path.name}.{state}") for state in ("new", "old"))
        for left_over in (new, old):  # from a killed process
            shutil.rmtree(left_over, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            write_config(config, new / self.config.name)
            write_names(new / self.labels.name, label_names)
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def open_board(self, step: int) -> None:
        """Let `log` write TensorBoard events too; existing events after `step` are hidden."""
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter  # installed if `check_board` passed

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl, and to TensorBoard's events after `open_board`."""
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
        """Truncate metrics.jsonl to its length at a checkpoint: later steps will be logged again."""
        if self.writes and self.metrics.is_file():
            os.truncate(self.metrics, size)

    def remove_checkpoints(self) -> None:
        """Remove checkpoint/."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_report(self, report: dict[str, Any]) -> None:
        """Write report.json atomically."""
        if self.writes:
            write_text_atomic(self.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    def read_labels(self) -> tuple[str, ...] | None:
        """The class names in the order of the logits; None for an adapter folder without them.

        The run and its adapter/ both have them, as people share the latter. Raises ConfigError if a file is broken or
        missing from a run, or if the two differ.
        """
        run = self.config.is_file()
        files = [path for path in (self.labels, self.adapter_labels) if path.exists() or (run and path == self.labels)]
        names = {read_names(path) for path in files}
        if len(names) > 1:
            raise ConfigError(f"{self.labels} and {self.adapter_labels} differ; remove the one that is wrong")
        return names.pop() if names else None


def changed_settings(there: RunConfig, wanted: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ, by dotted name: the value there and the wanted one."""

    def flat(section: Any, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in (field.name for field in dataclasses.fields(section)):
            value = getattr(section, name)
            found |= flat(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name: value}
        return found

    old, new = flat(there, ""), flat(wanted, "")
    names = [*new, *(name for name in old if name not in new)]  # a table of one run alone has fields there alone
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def check_board() -> None:
    """Raise ConfigError if TensorBoard's writer is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("train.tensorboard needs the extra: pip install -e '.[tensorboard]'")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. Raises ValueError if one is not JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
