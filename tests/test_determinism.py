"""The same settings and seed give the same bits; and the numbers of a fixed run are those that are written down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import batching
from data.batching import encode_split, evaluation_batches, training_batches
from data.sources import Split
from roberta.tokenizer import TextTokenizer
from tests import golden
from tests.conftest import tiny_rows, tiny_tokenizer
from tests.forked import outcome
from tests.test_resume import OPTIONS
from train import train
from training.config import parse_command_line
from training.errors import ConfigError
from training.precision import use_determinism

ROOT = Path(__file__).resolve().parents[1]
ALL_OPTIONS = [*OPTIONS, "--train.epochs", "3", "--train.device", "cpu"]


@pytest.fixture
def restored():
    """What use_determinism sets is taken back."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    if before is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    else:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before


@pytest.mark.parametrize("name", ["without dropout", "with dropout"])
def test_the_golden_run_has_the_numbers_written_down(name):
    expected = json.loads(golden.FILE.read_text())[name]
    found = golden.run(0.125 if name == "with dropout" else 0.0)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        ours, theirs = torch.tensor(found[key], dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
        assert ours.shape == theirs.shape and theirs.isfinite().all()
        deviation = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert deviation <= 1e-12, f"{name}, {key}: off by {deviation:.1e}; meant? python -m tests.golden writes anew"


def test_the_golden_run_trains():
    """Numbers that do not move would prove nothing."""
    for one in json.loads(golden.FILE.read_text()).values():
        assert np.mean(one["losses"][-10:]) < 0.8 * np.mean(one["losses"][:10])
    start = golden.model_of(0.0)
    assert golden.run(0.0)["losses"][0] != golden.run(0.125)["losses"][0]
    trained = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    assert trained == set(one) - {"losses", "logits"} and len(trained) > 20


def command(tiny_config, folder):
    return [str(tiny_config), *ALL_OPTIONS, "--output", str(folder)]


def test_a_run_has_the_same_bits_in_another_process(tiny_config, tmp_path, monkeypatch):
    """Another process has other addresses, another order of sets, other threads for loading and tokenizing."""
    monkeypatch.setattr("training.recorder.write_pages", lambda folder: None)
    assert train(parse_command_line(command(tiny_config, tmp_path / "here"))) == 0
    code = (
        "import sys, torch\n"
        "import train as module\n"
        "from data import batching\n"
        "from training import recorder\n"
        "from training.config import parse_command_line\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "recorder.draw_plots = recorder.write_html_report = lambda folder: None\n"
        "real = batching.DataLoader\n"
        "batching.DataLoader = lambda *a, **options: real(*a, **options | {'num_workers': 1})\n"
        "sys.exit(module.train(parse_command_line(sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command(tiny_config, tmp_path / "there")],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "77", "RAYON_NUM_THREADS": "3", "LORABERTA_CACHE": str(tmp_path / "c")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "here") == outcome(tmp_path / "there")


def test_another_seed_gives_other_bits(tiny_config, tmp_path, monkeypatch):
    """So that the comparison above can fail."""
    monkeypatch.setattr("training.recorder.write_pages", lambda folder: None)
    short = ["--train.epochs", "1"]
    for folder, seed in (("a", "1"), ("b", "2")):
        assert train(parse_command_line([*command(tiny_config, tmp_path / folder), *short, "--train.seed", seed])) == 0
    assert outcome(tmp_path / "a")[2] != outcome(tmp_path / "b")[2]


@pytest.fixture
def split():
    rows = tiny_rows(90)
    texts = Split([text for _, text in rows], [int(label == "sports") for label, _ in rows])
    return encode_split(texts, TextTokenizer(tiny_tokenizer(), 8))


def batches_with(monkeypatch, workers, split):
    real = batching.DataLoader
    with monkeypatch.context() as patch:
        patch.setattr(batching, "DataLoader", lambda *a, **options: real(*a, **options | {"num_workers": workers}))
        loaders = [training_batches(split, 7, 1, seed=3, epoch=2, skip=1), evaluation_batches(split, 8, 1)]
        return [list(vars(batch).values()) for loader in loaders for batch in loader]


def test_batches_do_not_depend_on_the_number_of_workers(monkeypatch, split):
    alone = batches_with(monkeypatch, 0, split)
    assert len(alone) == 12 + 12
    for workers in (1, 2):
        state = torch.get_rng_state()
        several = batches_with(monkeypatch, workers, split)
        assert torch.equal(torch.get_rng_state(), state), "loading drew from the generator of the dropout masks"
        for ours, theirs in zip(several, alone, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a is b is None or torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_deterministic_switches_torch_and_cublas(restored, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_determinism(True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    use_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the smaller one is repeatable too, and the user's choice
    use_determinism(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0' in the environment; unset it"):
        use_determinism(True)


def test_a_deterministic_run_on_a_cpu_is_the_same_run(tiny_config, tmp_path, monkeypatch, restored):
    """Every operation of a run has a repeatable form, or torch would have raised; and nothing else changes."""
    monkeypatch.setattr("training.recorder.write_pages", lambda folder: None)
    asked = []
    monkeypatch.setattr(
        "training.setup.use_determinism", lambda wanted: (asked.append(wanted), use_determinism(wanted))
    )
    for folder, more in (("plain", []), ("strict", ["--train.deterministic"])):
        options = [*command(tiny_config, tmp_path / folder), "--train.epochs", "1", *more]
        assert train(parse_command_line(options)) == 0
    assert asked == [False, True]
    (plain, *rest), (strict, *rest_strict) = outcome(tmp_path / "plain"), outcome(tmp_path / "strict")
    assert strict["config"]["train"].pop("deterministic") and not plain["config"]["train"].pop("deterministic")
    assert (plain, rest) == (strict, rest_strict)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deterministic_runs_on_a_gpu_have_the_same_bits(tiny_config, tmp_path, precision):
    """In fresh processes: cuBLAS reads its workspace once."""
    results = []
    for folder in ("one", "other"):
        options = ["--train.device", "cuda", "--train.precision", precision, "--train.deterministic"]
        arguments = [str(tiny_config), *OPTIONS, *options, "--train.epochs", "2", "--output", str(tmp_path / folder)]
        done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(outcome(tmp_path / folder))
    assert results[0] == results[1]
