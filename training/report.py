"""A finished run in numbers: what `report.json` holds."""

from __future__ import annotations

import dataclasses
import platform
import re
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora.adapter import adapters
from lora.inject import ParameterCount
from training.calibration import Calibration
from training.checkpoint import TrainState
from training.config import RunConfig
from training.precision import Compute
from training.scoring import Scores
from training.setup import Inputs


def peak_memory_bytes(compute: Compute) -> int:
    """Peak memory so far: on a GPU what torch allocated there, else the process's resident set."""
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated(compute.device)
    try:  # Linux, where getrusage would start at the parent process's peak
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def build_report(
    config: RunConfig,
    inputs: Inputs,
    model: nn.Module,
    count: ParameterCount,
    compute: Compute,
    state: TrainState,
    test: Scores | None,
    seconds: float,
    test_seconds: float,
    mistakes: list[dict[str, Any]],
    calibration: Calibration | None,
) -> dict[str, Any]:
    """The content of report.json. `test` is None for an interrupted run, `calibration` also for multi-label data."""
    return {
        "complete": test is not None,
        "test": dataclasses.asdict(test) if test else None,
        "validation": dataclasses.asdict(state.best) if state.best else None,
        "test_texts_per_second": len(inputs.text.test.texts) / test_seconds if test else None,
        "mistakes": mistakes,
        "calibration": dataclasses.asdict(calibration) if calibration else None,
        "label_names": list(inputs.text.label_names),
        "problem_type": inputs.model_config.problem_type,
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "parameters_by_part": {name: {"trainable": t, "total": a} for name, (t, a) in count.parts.items()},
        "ranks": {name: int(one.kept.sum()) for name, one in adapters(model).items() if hasattr(one, "kept")},
        "epochs_run": state.epoch - (state.step_of_epoch == 0),
        "best_epoch": state.best_epoch,
        "steps": state.step,
        "train_seconds": round(state.train_seconds, 2),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory_bytes(compute),
        "device": compute.describe(),
        "origins": {
            "data": inputs.text.origin,
            "checkpoint": inputs.checkpoint.origin,
            "model_type": inputs.model_config.model_type,
        },
        "versions": {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")},
        "config": dataclasses.asdict(config),
    }
