"""Run a set of configurations, each in its own process, and collect the results in one table.

    python -m experiments.table experiments/agnews --seeds 3 --jobs 2 --set train.epochs=2

Finished runs are skipped, interrupted runs resume from their last checkpoint, failed runs are listed at the end. The
folder of the table contains configs/ (what was run), logs/, runs/ (one run folder each) and results.csv, .md and .html.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from data.sources import LABELS_OF_NAMED_SOURCES
from experiments.grid import Planned, parse_override, plan
from experiments.results import collect, format_table, write_results
from roberta.config import PUBLISHED
from training.budget import trainable_parameters
from training.command_line import EXIT_INTERRUPTED, parse_options, run_command
from training.config import RunConfig, read_config, write_config
from training.errors import ConfigError
from training.progress import minutes, say
from training.run_folder import RunFolder, changed_settings

_TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Arguments:
    """Run configurations and collect the results in one table."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """TOML files, or folders of TOML files."""
    output: Path = Path("runs/table")
    """Folder of the table."""
    seeds: int = 1
    """Runs of each configuration, with consecutive seeds from the configuration's own."""
    jobs: int | None = None
    """Concurrent runs; by default one per GPU, or one on a CPU."""
    set: tuple[str, ...] = ()
    """Fields to set in every configuration: field=value."""
    limit: int = 1_000_000
    """Trainable parameters up to which a configuration counts as within budget."""
    shard: str | None = None
    """Run only shard I of N, written I/N with I from 1: for the array jobs of a cluster."""
    plan: bool = False
    """Only show the configurations and their trainable parameters."""


def make_table(arguments: Arguments) -> int:
    """Run what is not finished and write the results. Returns the exit code: 1 if a run failed."""
    if arguments.seeds < 1 or (arguments.jobs is not None and arguments.jobs < 1):
        raise ConfigError("--seeds and --jobs must be 1 or more")
    overrides = dict(map(parse_override, arguments.set))
    if len(overrides) < len(arguments.set):
        raise ConfigError("--set: a field is set twice; remove one")
    planned = plan(list(arguments.paths), overrides, arguments.seeds)
    if arguments.plan:
        say(_plan_table(planned, arguments.limit))
        return 0
    return run_table(planned, arguments)


def run_table(planned: list[Planned], arguments: Arguments) -> int:
    """Run what is not finished of `planned`, in this shard, and write the results of all. Returns the exit code."""
    for run in planned:
        _check_same_grid(arguments.output, run)
    shard = _shard(planned, arguments.shard)
    pending = [run for run in shard if not _run_folder(arguments.output, run).is_complete()]
    say(f"{len(planned)} runs, {len(shard)} of them in this shard, {len(shard) - len(pending)} already finished")

    failed: dict[str, str] = {}
    interrupted = False
    try:
        _run_all(pending, arguments, failed)
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted; run the same command again to resume")
    rows = collect(planned, arguments.output / "runs", arguments.limit)
    causes: dict[str, list[str]] = {}  # often the same for all: no network, no such file
    for name, why in failed.items():
        causes.setdefault(why, []).append(name)
    failures = [(", ".join(names), why) for why, names in causes.items()]
    write_results(rows, arguments.output, list(arguments.set), failures)
    say(f"\n{format_table(rows)}\n\nwritten to {arguments.output}/results.csv, .md and .html")
    for names, why in failures:
        say(f"failed: {names}: {why} (see {arguments.output / 'logs'})")
    return EXIT_INTERRUPTED if interrupted else int(bool(failed))


def _run_all(pending: list[Planned], arguments: Arguments, failed: dict[str, str]) -> None:
    """Run all, --jobs at a time. Fills `failed`: name of the run folder -> exit code and last line of its log."""
    output = arguments.output
    slots = arguments.jobs or max(1, torch.cuda.device_count())
    total, started = len(pending), time.perf_counter()
    queue = list(pending)
    running: dict[int, tuple[Planned, subprocess.Popen[bytes], float]] = {}
    try:
        while queue or running:
            for slot in range(slots):
                if queue and slot not in running:
                    run = queue.pop(0)
                    running[slot] = run, _start(run, output, slot, slots), time.perf_counter()
            time.sleep(0.2)
            for slot, (run, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                folder = _run_folder(output, run)
                if process.returncode == 0 and folder.is_complete():
                    report = folder.read_report()
                    outcome = f"{100 * report['test']['accuracy']:.2f} %"
                else:
                    log = _log(output, run).read_text(encoding="utf-8", errors="replace")
                    lines = log.strip().splitlines() or ["no output"]
                    failed[run.folder] = f"exit code {process.returncode}: {lines[-1]}"
                    outcome = "FAILED"
                done = total - len(queue) - len(running)
                left = (time.perf_counter() - started) / done * (total - done)
                say(
                    f"[{done:>{len(str(total))}}/{total}] {run.folder}  {outcome}  in "
                    f"{minutes(time.perf_counter() - since)}  {minutes(left)} left"
                )
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def _start(run: Planned, output: Path, slot: int, slots: int) -> subprocess.Popen[bytes]:
    """Start a run in its own process, with one of the GPUs or a share of the cores."""
    config = dataclasses.replace(run.config, output=str(_run_folder(output, run).path), overwrite=False, resume=True)
    for folder in ("configs", "logs", "runs"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    path = output / "configs" / f"{run.folder}.toml"
    write_config(config, path)
    environment = dict(os.environ)
    gpus = torch.cuda.device_count()
    if gpus > 1:  # a single GPU is visible to the process anyway
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = names[slot % gpus]
    elif not gpus:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
    with _log(output, run).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(_TRAIN), str(path)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _run_folder(output: Path, run: Planned) -> RunFolder:
    return RunFolder(output / "runs" / run.folder)


def _log(output: Path, run: Planned) -> Path:
    return output / "logs" / f"{run.folder}.log"


def _check_same_grid(output: Path, run: Planned) -> None:
    """Raise ConfigError if the table's folder has a run of this name with other settings."""
    folder = _run_folder(output, run)
    if not folder.config.is_file():
        return
    for field, (there, wanted) in changed_settings(read_config(folder.config), run.config).items():
        if field not in ("output", "overwrite", "resume"):
            raise ConfigError(
                f"{output}: contains results of another grid: {run.folder} has {field} = {there!r}, not {wanted!r}; "
                "choose another --output"
            )


def _shard(planned: list[Planned], shard: str | None) -> list[Planned]:
    """Shard I of N: every N-th run, so that shards take about equally long. Raises ConfigError."""
    if shard is None:
        return planned
    i, slash, number = shard.partition("/")
    if not (slash and i.isdigit() and number.isdigit() and 1 <= int(i) <= int(number)):
        raise ConfigError(f"--shard {shard}: write it as I/N with I from 1 to N, for example 1/8")
    return planned[int(i) - 1 :: int(number)]


def _plan_table(planned: list[Planned], limit: int) -> str:
    """Configurations with their trainable parameters, counted without reading weights or data."""
    configs = {run.name: run.config for run in planned}
    width = max(map(len, configs))
    lines = [f"{'configuration':<{width}}  {'trainable':>11}  within {limit:,}"]
    for name, config in configs.items():
        count = _trainable(config)
        known = f"{count:>11,}  {'yes' if count <= limit else 'no'}" if count else f"{'?':>11}  ?"
        lines.append(f"{name:<{width}}  {known}")
    return "\n".join([*lines, "", f"{len(configs)} configurations, {len(planned)} runs"])


def _trainable(config: RunConfig) -> int | None:
    """Trainable parameters; None unless checkpoint and data set are known by name."""
    model, labels = PUBLISHED.get(config.model.checkpoint), LABELS_OF_NAMED_SOURCES.get(config.data.source)
    if model is None or labels is None:
        return None
    return trainable_parameters(dataclasses.replace(model, label_names=tuple(map(str, range(labels)))), config.methods)


if __name__ == "__main__":
    sys.exit(run_command(lambda: make_table(parse_options(Arguments, sys.argv[1:], prog="experiments.table"))))
