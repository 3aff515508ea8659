"""The same table on a Ray cluster: one task for each run, wherever Ray finds a place for it.

    python -m experiments.ray_table experiments/agnews --seeds 3 --output /shared/table --gpus 1

Every task calls `experiments.table` with one part of the runs; at the end the same command, finding all of them
finished, writes the results. The project and the output folder must be at the same path on every node.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.grid import parse_override, plan
from training.command_line import parse_options, run_command
from training.errors import ConfigError
from training.progress import say

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Arguments:
    """Run a table on the Ray cluster that this machine belongs to, or on this machine alone."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """TOML files, or folders whose *.toml are meant."""
    output: Path = Path("runs/table")
    """Folder of the table, the same on every node."""
    seeds: int = 1
    """Runs of each configuration."""
    set: tuple[str, ...] = ()
    """Fields to set in every configuration: field=value."""
    gpus: float = 0
    """GPUs of one run."""
    cpus: float = 1
    """Cores of one run."""


def main(arguments: Arguments) -> int:
    """Run every part as a Ray task, then write the results. Returns the exit code: 1 if a run failed."""
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed; install the extra: pip install -e '.[ray]'") from None
    number = len(plan(list(arguments.paths), dict(map(parse_override, arguments.set)), arguments.seeds))
    command = [sys.executable, "-m", "experiments.table", *(str(path.resolve()) for path in arguments.paths)]
    command += ["--output", str(arguments.output.resolve()), "--seeds", str(arguments.seeds), "--jobs", "1"]
    if arguments.set:
        command += ["--set", *arguments.set]

    @ray.remote(num_cpus=arguments.cpus, num_gpus=arguments.gpus, max_retries=3)
    def part(i: int) -> int:
        # Ray gives the task its GPU by CUDA_VISIBLE_DEVICES, which the table leaves alone when there is one place.
        return subprocess.run([*command, "--shard", f"{i}/{number}"], cwd=_ROOT, check=False).returncode

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    waiting = [part.remote(i) for i in range(1, number + 1)]
    while waiting:
        done, waiting = ray.wait(waiting)
        say(f"[{number - len(waiting)}/{number}] {'finished' if ray.get(done[0]) == 0 else 'FAILED'}")
    ray.shutdown()
    return subprocess.run(command, cwd=_ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="experiments.ray_table"))))
