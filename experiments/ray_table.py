"""The same table on a Ray cluster, with one task per run.

    python -m experiments.ray_table experiments/agnews --seeds 3 --output /shared/table --gpus 1

Each task calls `experiments.table` with one shard of the runs. At the end the same command without a shard finds all
of them finished and writes the results. The project and the output folder must be at the same path on every node.
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
    """Run a table on the Ray cluster of this machine, or on this machine alone."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """TOML files, or folders of TOML files."""
    output: Path = Path("runs/table")
    """Folder of the table, at the same path on every node."""
    seeds: int = 1
    """Runs of each configuration."""
    set: tuple[str, ...] = ()
    """Fields to set in every configuration: field=value."""
    gpus: float = 0
    """GPUs per run."""
    cpus: float = 1
    """Cores per run."""


def main(arguments: Arguments) -> int:
    """Run each shard as a Ray task, then write the results. Returns the exit code: 1 if a run failed."""
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
    def run_shard(i: int) -> int:
        # Ray sets CUDA_VISIBLE_DEVICES for the task. The table does not change it when it sees a single GPU.
        return subprocess.run([*command, "--shard", f"{i}/{number}"], cwd=_ROOT, check=False).returncode

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    pending = [run_shard.remote(i) for i in range(1, number + 1)]
    while pending:
        done, pending = ray.wait(pending)
        say(f"[{number - len(pending)}/{number}] {'finished' if ray.get(done[0]) == 0 else 'FAILED'}")
    ray.shutdown()
    return subprocess.run(command, cwd=_ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="experiments.ray_table"))))
