"""Run a set of configurations, each in a process of its own, and put them into one table.

    python -m experiments.table experiments/agnews --seeds 3 --jobs 2 --set train.epochs=2

What is finished is skipped, what was cut off goes on from its last checkpoint, what fails is listed at the end. The
folder of the table holds configs/ (what was run), logs/, runs/ (a run folder each) and results.csv, .md and .html.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from data.sources import LABELS_OF_NAMED_SOURCES
from experiments.grid import Planned, parse_override, plan
from experiments.results import collect, format_table, write_results
from lora.budget import SHAPES
from roberta.config import RobertaConfig
from training.budget import trainable_parameters
from training.command_line import EXIT_INTERRUPTED, parse_options, run_command
from training.config import RunConfig, read_config, write_config
from training.errors import ConfigError
from training.progress import minutes, say
from training.run_folder import RunFolder, changed_settings

_TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Arguments:
    """Run configurations and put them into one table."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """TOML files, or folders whose *.toml are meant."""
    output: Path = Path("runs/table")
    """Folder of the table."""
    seeds: int = 1
    """Runs of each configuration: with its own seed, that plus 1, and so on."""
    jobs: int | None = None
    """Runs at a time; one for each GPU, or one on a CPU, unless given."""
    set: tuple[str, ...] = ()
    """Fields to set in every configuration: field=value."""
    limit: int = 1_000_000
    """Trainable parameters up to which a configuration counts as within budget."""
    shard: str | None = None
    """Run only part I of N, written I/N from 1 on: for the array jobs of a cluster."""
    plan: bool = False
    """Only show the configurations and their trainable parameters."""


def make_table(arguments: Arguments) -> int:
    """Run what is to be run and write the results. Returns the exit code: 1 if a run failed."""
    if arguments.seeds < 1 or (arguments.jobs is not None and arguments.jobs < 1):
        raise ConfigError("--seeds and --jobs must be 1 or more")
    overrides = dict(map(parse_override, arguments.set))
    if len(overrides) < len(arguments.set):
        raise ConfigError("--set: a field is set twice; remove one")
    planned = plan(list(arguments.paths), overrides, arguments.seeds)
    if arguments.plan:
        say(_plan_table(planned, arguments.limit))
        return 0
    for run in planned:
        _check_same_grid(arguments.output, run)
    chosen = _part(planned, arguments.shard)
    waiting = [run for run in chosen if not _finished(arguments.output, run)]
    say(f"{len(planned)} runs, {len(chosen)} of them here, {len(chosen) - len(waiting)} of these finished before")

    failed: dict[str, str] = {}
    interrupted = False
    try:
        _run_all(waiting, arguments, failed)
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted; the same command goes on from here")
    rows = collect(planned, arguments.output / "runs", arguments.limit)
    causes: dict[str, list[str]] = {}  # often one: no hub, no such file
    for name, why in failed.items():
        causes.setdefault(why, []).append(name)
    failures = [(", ".join(names), why) for why, names in causes.items()]
    write_results(rows, arguments.output, list(arguments.set), failures)
    say(f"\n{format_table(rows)}\n\nwritten to {arguments.output}/results.csv, .md and .html")
    for names, why in failures:
        say(f"failed: {names}: {why} (see {arguments.output / 'logs'})")
    return EXIT_INTERRUPTED if interrupted else int(bool(failed))


def _run_all(waiting: list[Planned], arguments: Arguments, failed: dict[str, str]) -> None:
    """Start runs as places become free, until none is left; fills `failed` by name of the run folder."""
    gpus = _gpus()
    places = list(range(arguments.jobs or max(1, gpus)))
    total, started = len(waiting), time.perf_counter()
    running: dict[int, tuple[Planned, subprocess.Popen[bytes], float]] = {}
    queue = list(waiting)
    try:
        while queue or running:
            for place in places:
                if queue and place not in running:
                    run = queue.pop(0)
                    running[place] = run, _start(run, arguments.output, place, len(places), gpus), time.perf_counter()
            time.sleep(0.2)
            for place, (run, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[place]
                log = arguments.output / "logs" / f"{run.folder}.log"
                if process.returncode == 0 and _finished(arguments.output, run):
                    report = json.loads(RunFolder(arguments.output / "runs" / run.folder).report.read_text())
                    outcome = f"{100 * report['test']['accuracy']:.2f} %"
                else:
                    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
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


def _start(run: Planned, output: Path, place: int, places: int, gpus: int) -> subprocess.Popen[bytes]:
    """One run in a process of its own: on its own GPU, or with its share of the cores."""
    folder = output / "runs" / run.folder
    config = dataclasses.replace(run.config, output=str(folder), overwrite=False, resume=True)
    for part in ("configs", "logs", "runs"):
        (output / part).mkdir(parents=True, exist_ok=True)
    path = output / "configs" / f"{run.folder}.toml"
    write_config(config, path)
    environment = dict(os.environ)
    if gpus > 1:  # a single one is what the process sees anyway
        environment["CUDA_VISIBLE_DEVICES"] = _visible_gpus(gpus)[place % gpus]
    elif not gpus and "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // places))
    with (output / "logs" / f"{run.folder}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(_TRAIN), str(path)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _visible_gpus(gpus: int) -> list[str]:
    """Names of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else list(map(str, range(gpus)))


def _gpus() -> int:
    import torch  # takes a second to import

    return torch.cuda.device_count()


def _finished(output: Path, run: Planned) -> bool:
    """Whether the run folder holds a complete report."""
    return RunFolder(output / "runs" / run.folder).is_complete()


def _check_same_grid(output: Path, run: Planned) -> None:
    """Raise ConfigError if the folder holds a run of this name with other settings."""
    folder = RunFolder(output / "runs" / run.folder)
    if not folder.config.is_file():
        return
    for field, (there, wanted) in changed_settings(read_config(folder.config), run.config).items():
        if field not in ("output", "overwrite", "resume"):
            raise ConfigError(
                f"{output}: holds results of another grid: {run.folder} has {field} = {there!r}, not {wanted!r}; "
                "choose another --output"
            )


def _part(planned: list[Planned], shard: str | None) -> list[Planned]:
    """The runs of part I of N: every N-th, so that parts are equally long. Raises ConfigError."""
    if shard is None:
        return planned
    part, slash, parts = shard.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"--shard {shard}: write it as I/N with I from 1 to N, for example 1/8")
    return planned[int(part) - 1 :: int(parts)]


def _plan_table(planned: list[Planned], limit: int) -> str:
    """Configurations with their trainable parameters, computed without reading weights or data."""
    configs = {run.name: run.config for run in planned}
    width = max(map(len, configs))
    lines = [f"{'configuration':<{width}}  {'trainable':>11}  within {limit:,}"]
    for name, config in configs.items():
        count = _trainable(config)
        known = f"{count:>11,}  {'yes' if count <= limit else 'no'}" if count else f"{'?':>11}  ?"
        lines.append(f"{name:<{width}}  {known}")
    return "\n".join([*lines, "", f"{len(configs)} configurations, {len(planned)} runs"])


def _trainable(config: RunConfig) -> int | None:
    """Trainable parameters, where model and number of classes are known by name."""
    shape, labels = SHAPES.get(config.model.checkpoint), LABELS_OF_NAMED_SOURCES.get(config.data.source)
    if shape is None or labels is None:
        return None
    model = RobertaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        intermediate_size=shape.intermediate,
        label_names=tuple(map(str, range(labels))),
    )
    return trainable_parameters(model, config.lora)


if __name__ == "__main__":
    sys.exit(run_command(lambda: make_table(parse_options(Arguments, sys.argv[1:], prog="experiments.table"))))
