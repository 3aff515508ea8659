"""experiments.ray_table, on a local Ray."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_table_on_a_local_ray(tiny_config, tmp_path):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    command = [sys.executable, "-m", "experiments.ray_table", str(tiny_config), "--seeds", "2", "--output"]
    command += [str(tmp_path / "table"), "--set", "train.epochs=1"]
    # By default the niceness of Ray's workers is 15: on a busy machine they might never finish.
    environment = {**os.environ, "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    assert "[2/2] finished" in done.stdout and "2 already finished" in done.stdout
    (row,) = csv.DictReader((tmp_path / "table" / "results.csv").open())
    assert row["seeds"] == "2 of 2"


def test_without_ray_the_extra_is_named(tiny_config, tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ray_table", str(tiny_config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and ".[ray]" in done.stderr and done.stderr.count("\n") == 1
