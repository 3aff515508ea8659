"""Checkpoints of a run: everything the remaining steps depend on, so that an interrupted run resumes bit for bit.

checkpoint/step-00000120/
    tensors.safetensors   trainable parameters, the adapters' buffers, optimizer moments, states of torch's generators
    state.json            counters, schedule, scaler, best score, states of Python's and numpy's generators
    sha256.json           hashes of the two, written last

A checkpoint is written under another name, flushed to the disk and renamed, so it is complete or absent. If its bytes
have changed since, the hashes differ, and the previous checkpoint is used. Nothing in it can run code: tensors are
safetensors, the rest is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.assets import sha256_of
from lora.adapter import Adapter
from lora.files import flush
from training.errors import ConfigError
from training.scoring import Scores

_FILES = ("tensors.safetensors", "state.json")
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")


@dataclass
class TrainState:
    """State of the training loop, the same in every process."""

    epoch: int = 1
    """Current epoch, from 1."""
    step_of_epoch: int = 0
    """Optimizer steps done in this epoch."""
    step: int = 0
    """Optimizer steps done in total."""
    epoch_loss: float = 0.0
    """Sum of the losses logged so far in this epoch, in nats."""
    epoch_steps: int = 0
    """Number of these losses."""
    unread: list[tuple[float, float]] = field(default_factory=list)
    """Learning rate and loss of each step since the last logged line."""
    tokens: int = 0
    """Real tokens since the last logged line."""
    averages: dict[str, Any] = field(default_factory=dict)
    """Those of `PseudoLabels`, for unlabelled texts."""
    best: Scores | None = None
    """Validation scores of the best epoch so far."""
    best_epoch: int = 0
    metrics_bytes: int = 0
    """Length of metrics.jsonl: lines after it are removed on resume and logged again."""
    seconds: float = 0.0
    """Wall time of the run so far, interruptions excluded."""
    train_seconds: float = 0.0
    """The part of it spent in the training loop."""


def save(
    folder: Path,
    train_state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    fingerprints: dict[str, str],
    keep: int,
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. Raises OSError if it can't be written."""
    tensors = {f"parameter/{name}": value.detach() for name, value in _trained(model)}
    for name, value in _trained(model):
        for key, moment in optimizer.state.get(value, {}).items():
            tensors[f"optimizer/{key}/{name}"] = moment
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for i, generator in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda/{i}"] = generator
    kind, numpy_keys, *numpy_rest = np.random.get_state()
    state = {
        "train_state": dataclasses.asdict(train_state),
        "schedule": {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"},
        "learning_rates": [group["lr"] for group in optimizer.param_groups],
        "scaler": scaler.state_dict(),
        "python": random.getstate(),
        "numpy": [kind, numpy_keys.tolist(), *numpy_rest],
        "fingerprints": fingerprints,
    }
    folder.mkdir(exist_ok=True)
    for left_over in folder.glob(".part-*"):  # from a killed process
        shutil.rmtree(left_over)
    part = folder / f".part-{os.getpid()}"
    part.mkdir()
    try:
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part / _FILES[0])
        except SafetensorError as error:  # the library's own error, also for a full disk
            raise OSError(str(error)) from None
        (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
        hashes = {name: sha256_of(part / name) for name in _FILES}
        (part / "sha256.json").write_text(json.dumps(hashes), encoding="utf-8")
        for name in (*_FILES, "sha256.json"):
            flush(part / name)
        final = folder / f"step-{train_state.step:08d}"
        superseded = [path for path in _newest_first(folder) if path.stem == final.name]
        if superseded:  # the same step again, after a resume: under a new name, so that one always exists
            final = folder / f"{final.name}.{int(superseded[0].suffix[1:] or 0) + 1}"
        part.rename(final)
        flush(folder)
        for path in superseded:
            shutil.rmtree(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old)
    return final


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]] | None:
    """The newest intact checkpoint as (state, tensors, messages about newer damaged ones); None if there is none.

    Raises ConfigError if every checkpoint is damaged.
    """
    complaints: list[str] = []
    for path in _newest_first(folder):
        try:
            hashes = json.loads((path / "sha256.json").read_text(encoding="utf-8"))
            wrong = [name for name in _FILES if sha256_of(path / name) != hashes[name]]
            if wrong:
                raise ValueError(f"{wrong[0]} has changed since it was written")
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return state, load_file(path / "tensors.safetensors"), complaints
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            complaints.append(f"{path} is damaged ({error}); the one before it is used")
    if complaints:
        raise ConfigError(f"{folder}: every checkpoint is damaged; start again with --overwrite")
    return None


def restore(
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> TrainState:
    """Restore model, optimizer, schedule, scaler and random states in place, and return the state of the loop.

    Raises ConfigError if the checkpoint is from another run: a value is missing, or has another type or shape.
    """
    try:
        with torch.no_grad():
            for name, value in _trained(model):
                saved = tensors[f"parameter/{name}"]
                if saved.shape != value.shape:  # `copy_` would broadcast
                    raise ValueError(f"{name} is {list(saved.shape)}, not {list(value.shape)}")
                value.copy_(saved)
                moments = {
                    key.split("/", 2)[1]: tensor.to(value.device)
                    for key, tensor in tensors.items()
                    if key.startswith("optimizer/") and key.split("/", 2)[2] == name
                }
                if moments:
                    optimizer.state[value] = moments
        schedule.load_state_dict({**schedule.state_dict(), **state["schedule"]})
        for group, rate in zip(optimizer.param_groups, state["learning_rates"], strict=True):
            group["lr"] = rate
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, numpy_keys, *numpy_rest = state["numpy"]
        np.random.set_state((kind, np.array(numpy_keys, dtype=np.uint32), *numpy_rest))
        torch.set_rng_state(tensors["random/torch"])
        cuda = [tensors[f"random/cuda/{i}"] for i in range(len(tensors)) if f"random/cuda/{i}" in tensors]
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
        values = dict(state["train_state"])
        if values["best"] is not None:
            values["best"] = Scores(**values["best"])
        values["unread"] = [(rate, loss) for rate, loss in values["unread"]]
        return TrainState(**values)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"--resume: the checkpoint does not belong to this run ({what}); start again with --overwrite"
        ) from None


def check_fingerprints(found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise ConfigError naming the inputs that have changed since the checkpoint was written."""
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        raise ConfigError(
            f"--resume: {', '.join(changed)} changed since the run was interrupted; restore the original, or start "
            "again with --overwrite"
        )


def _trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What training changes: trainable parameters and the adapters' own buffers."""
    found = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            found += [(f"{name}.{own}", value) for own, value in module.named_buffers(recurse=False)]
    return found


def _newest_first(folder: Path) -> list[Path]:
    """step-00000130, step-00000120.1, step-00000120: the suffix counts how often a step was saved again."""
    names = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    found = [(int(name[1]), int(name[2] or 0), path) for name, path in names if name]
    return [path for *_, path in sorted(found, reverse=True)]
