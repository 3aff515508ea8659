"""Runs with `lora.init = "eva"`: where they start, resumed, in two processes, scored, and what is refused."""

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import EvaConfig as TheirEvaConfig
from peft.tuners.lora import initialize_lora_eva_weights
from safetensors.torch import load_file

import train as train_module
from evaluate import Arguments, evaluate
from lora.adapter import adapters
from tests.forked import outcome, run_forked
from tests.parity.oracle import assert_close
from tests.training.test_distributed import forks, run_train
from training import eva, recorder
from training.command_line import EXIT_BAD_INPUT, parse_options, run_command
from training.config import parse_command_line

EVA = ["--lora.init", "eva", "--lora.dropout", "0.1", "--train.epochs", "2", "--train.batch-size", "7"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """A fork has only the thread that made it; and it draws nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("draw_plots", "write_html_report"):
        monkeypatch.setattr(recorder, name, lambda folder: None)
    yield
    torch.set_num_threads(before)


def command(config, *more):
    """Run train.py's command in this process; returns its exit code."""
    arguments = [str(one) for one in (config, *EVA, *more)]
    return run_command(lambda: train_module.train(parse_command_line(arguments)))


@pytest.mark.parametrize("targets", [("query", "key", "value"), ("all-linear",)], ids=str)
def test_a_run_starts_where_pefts_does(tiny_config, tiny_checkpoint, monkeypatch, capsys, targets):
    """In float64, on the training batches of the first epoch."""
    starts, batches = [], []
    real_step, real_load, real_batches = train_module.train_step, train_module.load_base, eva.epoch_batches

    def step(model, *rest):
        if not starts:
            starts.append({name: (a.lora_A.clone(), a.lora_B.clone()) for name, a in adapters(model).items()})
        return real_step(model, *rest)

    monkeypatch.setattr(train_module, "train_step", step)
    monkeypatch.setattr(train_module, "load_base", lambda *a, **o: real_load(*a, **o).double())
    monkeypatch.setattr(eva, "epoch_batches", lambda *a: batches.extend(real_batches(*a)) or batches)
    assert command(tiny_config, "--lora.target-modules", *targets) == 0
    out = capsys.readouterr().out
    assert "EVA         A from the inputs in" in out

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    theirs = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=8,
        target_modules=targets[0] if len(targets) == 1 else list(targets),
        init_lora_weights="eva",
        eva_config=TheirEvaConfig(rho=1.0),
    )
    theirs = peft.get_peft_model(plain, theirs).eval()
    inputs = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in batches]
    assert len(inputs) == -(-sum(len(one["input_ids"]) for one in inputs) // 7) > 5
    initialize_lora_eva_weights(theirs, inputs, show_progress_bar=False)
    assert len(starts[0]) == (6 if len(targets) == 3 else 12)
    for name, (A, B) in starts[0].items():
        assert_close(A, theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight, 1e-10, name)
        assert not B.any()


def test_a_killed_run_resumes_bit_for_bit(tiny_config, tmp_path):
    arguments = [tiny_config, *EVA, "--train.checkpoint-steps", 3]
    assert run_forked([*arguments, "--output", tmp_path / "whole"]).code == 0
    events = run_forked([*arguments, "--output", tmp_path / "whole", "--overwrite"]).events
    steps = [i for i, name in enumerate(events) if name == "train_step"]
    for at in (steps[5], steps[-2]):
        folder = tmp_path / f"killed-{at}"
        assert run_forked([*arguments, "--output", folder], at).code < 0
        assert run_forked([*arguments, "--output", folder, "--resume"]).code == 0
        assert outcome(folder) == outcome(tmp_path / "whole")


def test_two_processes_start_from_one_A_and_equal_one(tiny_config, tmp_path):
    options = [tiny_config, *EVA, "--model.hidden-dropout", 0, "--model.attention-dropout", 0, "--lora.dropout", 0]
    options += ["--model.classifier-dropout", 0, "--train.log-every", 1]
    files, real = [], eva.initialize_from_inputs

    def other_bits(layers, *rest):  # as another kind of processor computes
        used = real(layers, *rest)
        for layer in layers.values():
            layer.lora_A.data.mul_(1.01)
        return used

    for size in (1, 2):

        def work(rank, size=size):
            if rank:
                eva.initialize_from_inputs = other_bits
            return run_train([*options, "--output", tmp_path / f"of-{size}"])

        statuses, seen = forks(size, work, tmp_path / f"forks-{size}")
        assert all(status == 0 for status in statuses), seen
        assert len({one[0]["weights"] for one in seen}) == 1
        files.append(load_file(tmp_path / f"of-{size}" / "adapter" / "adapter_model.safetensors"))
    for key, tensor in files[0].items():
        assert_close(files[1][key], tensor, 1e-8, key)


CHANGES = ["--model.base-bits 4", "--lora.use-dora", "--train.precision bf16", "--train.gradient-checkpointing"]


@pytest.mark.parametrize("more", ["", *CHANGES, "--train.accumulation-steps 2 --data.augmentation.n-aug 1"])
def test_a_run_is_scored_again(tiny_config, capsys, more):
    assert command(tiny_config, *more.split()) == 0
    run = tiny_config.parent / "run"
    first = capsys.readouterr().out
    words = [str(run)]
    assert run_command(lambda: evaluate(parse_options(Arguments, words, prog="evaluate.py"))) == 0
    table = [line for line in first.splitlines() if "accuracy" in line and "macro" in line][-1:]
    assert table
    assert table[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--lora.eva-config.rho", "2"], "eva_config.rho is 2.0; ranks are not redistributed"),
        (["--lora.rank", "64"], "has rank 64; it can be 32 at most"),
        (["--lora.eva-config.tau", "1.0"], "batches; lower eva_config.tau"),
        (["--lora.eva-config.adjust-scaling-factors", "true"], "adjust"),
        (["--lora.init", "default", "--lora.eva-config.tau", "0.9"], "eva_config has no effect, as init is 'default'"),
    ],
)
def test_what_is_not_supported_is_one_line(tiny_config, capsys, monkeypatch, more, message):
    monkeypatch.setattr(eva, "_MOST", 20)
    assert command(tiny_config, *more) == EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("table", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_in_front_are_refused(tiny_config, capsys, table):
    tiny_config.write_text(f"{tiny_config.read_text()}[{table}]\nnum_virtual_tokens = 2\n")
    assert command(tiny_config) == EXIT_BAD_INPUT
    assert f"lora.init is 'eva', which [{table}] can't be combined with; choose" in capsys.readouterr().err


def test_a_table_of_settings(tiny_config, capsys):
    text = tiny_config.read_text().replace("[data]", 'init = "eva"\n[lora.eva_config]\ntau = 0.95\n[data]')
    tiny_config.write_text(text)
    assert command(tiny_config, "--train.epochs", "1") == 0
    assert "tau = 0.95" in (tiny_config.parent / "run" / "config.toml").read_text()
    tiny_config.write_text(text.replace("tau", "whiten = true\ntau"))
    assert command(tiny_config) == EXIT_BAD_INPUT
    assert "unknown field lora.eva_config.whiten" in capsys.readouterr().err
