"""The table: each configuration runs once, finished runs are skipped, failures are listed, the files are right.

The runs of a table are processes. Here they are forks of this one, which start at once and draw nothing, except in the
test of the command line.
"""

import csv
import json
import re
import runpy
import statistics
import sys

import pytest
import torch

from experiments import results, table
from experiments.compare import Arguments as CompareArguments
from experiments.compare import compare
from experiments.plot import Arguments as PlotArguments
from experiments.plot import plot
from experiments.table import Arguments, make_table
from tests.conftest import write_tiny_config, write_tiny_data
from tests.forked import Forked
from training import recorder
from training.errors import ConfigError
from training.run_folder import RunFolder


@pytest.fixture
def forks(monkeypatch):
    """Runs are forks of this process, and draw no plots and pages."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has only the thread that made it
    monkeypatch.setattr(table.subprocess, "Popen", Forked)
    monkeypatch.setattr(recorder, "draw_plots", lambda folder: None)
    monkeypatch.setattr(recorder, "write_html_report", lambda folder: None)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_curves(monkeypatch):
    """The table's own plots are not drawn."""
    monkeypatch.setattr(results, "_CURVES", ())


@pytest.fixture(scope="module")
def grid(tiny_checkpoint, tmp_path_factory):
    """Two configurations that run for a second or two."""
    tiny_config = write_tiny_config(tiny_checkpoint, write_tiny_data(tmp_path_factory.mktemp("grid")))
    text = tiny_config.read_text().replace("rank = 4", "rank = [2, 4]").replace("epochs = 4", "epochs = 1")
    text = text.replace("seed = 1", "seed = 0")
    path = tiny_config.with_name("grid.toml")
    path.write_text(text)
    return path


def run(grid, tmp_path, **options):
    return make_table(Arguments((grid,), output=tmp_path / "table", **options))


def test_a_finished_table_is_not_run_again(forks, grid, tmp_path, capsys, monkeypatch):
    assert run(grid, tmp_path, seeds=2, jobs=2) == 0
    folder = tmp_path / "table"
    names = ["grid+rank=2-s0", "grid+rank=2-s1", "grid+rank=4-s0", "grid+rank=4-s1"]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == names
    reports = {name: json.loads((folder / "runs" / name / "report.json").read_text()) for name in names}
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["name"] for row in rows] == ["grid+rank=2", "grid+rank=4"]
    for row in rows:
        of_row = [report for name, report in reports.items() if name.startswith(row["name"] + "-")]
        accuracies = [100 * report["test"]["accuracy"] for report in of_row]
        assert float(row["accuracy"]) == pytest.approx(statistics.mean(accuracies))
        assert float(row["accuracy_spread"]) == pytest.approx(statistics.stdev(accuracies))
        assert int(row["trainable"]) == of_row[0]["trainable_parameters"]
        assert row["within_budget"] == "True" and row["seeds"] == "2 of 2" and row["epochs"] == "1"
    speeds = [float(row["speed"]) for row in rows]
    assert min(speeds) == 1.0
    assert "| grid+rank=2 |" in (folder / "results.md").read_text()
    page = (folder / "results.html").read_text()
    assert '<a href="runs/grid%2Brank%3D4-s0/report.html">grid+rank=4</a>' in page and page.count("<svg") == 6
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert len(list((folder / "plots").glob("*.png"))) == 6

    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/report.json")}
    (folder / "runs" / names[1] / "report.json").unlink()  # as if interrupted
    monkeypatch.setattr(results, "_CURVES", ())  # drawn once is enough
    capsys.readouterr()
    assert run(grid, tmp_path, seeds=2) == 0
    assert "3 already finished" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/report.json")}
    assert {path.parent.name for path in after if before[path] != after[path]} == {names[1]}


def test_a_failing_run_does_not_stop_the_others(forks, no_curves, grid, tmp_path, capsys):
    (tmp_path / "broken.toml").write_text("[data]\nsource = 'none.csv'\n")
    (tmp_path / "broken_2.toml").write_text("[data]\nsource = 'none.csv'\n")
    broken = (tmp_path / "broken.toml", tmp_path / "broken_2.toml")
    code = make_table(Arguments((*broken, grid), output=tmp_path / "table", set=("train.epochs=1",)))
    shown = capsys.readouterr().out
    assert code == 1
    assert "failed: broken-s0, broken_2-s0: exit code 2: error: none.csv: no such file" in shown
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "table" / "results.csv").open())}
    assert rows["broken"]["seeds"] == "0 of 1" and rows["broken"]["accuracy"] == ""
    assert rows["grid+rank=2"]["accuracy"] and rows["grid+rank=4"]["accuracy"]
    assert r"broken-s0, broken\_2-s0 failed" in (tmp_path / "table" / "results.md").read_text()
    assert "broken-s0, broken_2-s0 failed" in (tmp_path / "table" / "results.html").read_text()


def test_results_of_another_grid_are_not_mixed_in(forks, no_curves, grid, tmp_path):
    assert run(grid, tmp_path) == 0
    with pytest.raises(ConfigError, match=r"another grid: grid\+rank=2-s0 has train\.learning_rate = 0\.02, not 0\.5"):
        run(grid, tmp_path, set=("train.learning_rate=0.5",))


def test_shards_cover_all_runs(forks, no_curves, grid, tmp_path, capsys):
    assert run(grid, tmp_path, seeds=2, shard="2/3") == 0
    assert [path.name for path in (tmp_path / "table" / "runs").iterdir()] == ["grid+rank=2-s1"]
    rows = list(csv.DictReader((tmp_path / "table" / "results.csv").open()))
    assert [row["seeds"] for row in rows] == ["1 of 2", "0 of 2"]
    assert run(grid, tmp_path, seeds=2, shard="1/3") == 0 and run(grid, tmp_path, seeds=2, shard="3/3") == 0
    capsys.readouterr()
    assert run(grid, tmp_path, seeds=2) == 0
    assert "4 already finished" in capsys.readouterr().out


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_shards_that_do_not_exist(grid, tmp_path, shard):
    with pytest.raises(ConfigError, match="I/N"):
        run(grid, tmp_path, shard=shard)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"seeds": 0}, "--seeds"), ({"jobs": 0}, "--jobs"), ({"set": ("lora.rank=1", "lora.rank=2")}, "set twice")],
)
def test_invalid_options(grid, tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        run(grid, tmp_path, **options)


def test_the_command_line(tiny_config, tmp_path, monkeypatch, capsys):
    """The module is run as python -m runs it; the run it starts is a process of train.py, pages and all."""
    command = [
        str(tiny_config),
        "--output",
        str(tmp_path / "t"),
        "--set",
        "train.epochs=1",
        "lora.rank=3",
        "--jobs",
        "1",
    ]

    def code(*more):
        monkeypatch.setattr(sys, "argv", ["experiments.table", *command, *more])
        monkeypatch.delitem(sys.modules, "experiments.table", raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("experiments.table", run_name="__main__", alter_sys=True)
        return stop.value.code

    assert code() == 0
    out = capsys.readouterr().out
    assert "[1/1] tiny-s1" in out and "results.csv, .md and .html" in out
    assert (tmp_path / "t" / "runs" / "tiny-s1" / "report.html").is_file()
    assert code("--shard", "x") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --shard x") and err.count("\n") == 1


def test_curves_of_several_runs_in_one_plot(forks, no_curves, grid, tmp_path, capsys, monkeypatch):
    drawn: dict[str, list[float]] = {}
    monkeypatch.setattr("experiments.plot.draw_scores", lambda axes, scores: drawn.update(scores))
    assert run(grid, tmp_path) == 0
    runs = sorted((tmp_path / "table" / "runs").iterdir())
    RunFolder(runs[0]).report.unlink()
    lines = RunFolder(runs[0]).metrics.read_text().splitlines()
    RunFolder(runs[0]).metrics.write_text("\n".join(line for line in lines if "split" not in line) + "\n")
    capsys.readouterr()
    assert plot(PlotArguments(tuple(runs), tmp_path / "plots")) == 0
    assert "grid+rank=2-s0: no validation scores yet" in capsys.readouterr().out
    files = {"loss", "validation_loss", "accuracy", "recall", "test_accuracy"}
    assert {path.stem for path in (tmp_path / "plots").iterdir()} >= files
    tests = {path.name[:-3]: [json.loads((path / "report.json").read_text())["test"]["accuracy"]] for path in runs[1:]}
    assert drawn == {name: [100 * accuracy for accuracy in accuracies] for name, accuracies in tests.items()}
    with pytest.raises(ConfigError, match="two run folders are named"):
        plot(PlotArguments((*runs, runs[1]), tmp_path / "plots"))
    with pytest.raises(ConfigError, match="not a run folder"):
        plot(PlotArguments((tmp_path,), tmp_path / "plots"))


def test_a_comparison_takes_the_rate_that_is_best_on_the_validation_split(forks, no_curves, grid, tmp_path):
    output = tmp_path / "all"
    arguments = CompareArguments(
        (grid,), output=output, factors=(1e-3, 3.0), seeds=2, jobs=2, set=("lora.rank=2", "train.learning_rate=0.01")
    )
    assert compare(arguments) == 0
    scores = {}
    for rate in ("1e-05", "0.03"):
        report = json.loads((output / "runs" / f"grid+learning_rate={rate}-s0" / "report.json").read_text())
        scores[rate] = report["validation"]["accuracy"], -report["validation"]["loss"]
    best = max(scores, key=scores.get)
    finals = [output / "runs" / f"grid+learning_rate={best}-s{seed}" for seed in (0, 1)]
    assert len([*(output / "runs").iterdir()]) == 3, "the trial is the run with the first seed"
    tests = [100 * json.loads((path / "report.json").read_text())["test"]["accuracy"] for path in finals]
    shown = f"{statistics.mean(tests):.2f} ± {statistics.stdev(tests):.2f}"
    assert re.search(rf"\| grid \| [\d,]+ \| {float(best):g} \| {shown} \|", (output / "methods.md").read_text())
    assert (output / "methods.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="name TOML files"):
        compare(CompareArguments(()))
