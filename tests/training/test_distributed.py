"""A run in several processes equals a run in one: same losses, weights and scores; and what is lost when one dies.

Most runs here are forks of this process with RANK and WORLD_SIZE set, as torchrun would set them; the one in which a
process dies is started by torchrun.
"""

import datetime
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import train as train_module
from data.batching import EncodedSplit, bucketed_batches, collate, evaluation_batches, training_batches
from lora.config import LoRAConfig
from lora.inject import count_parameters, inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from tests.conftest import write_tiny_config
from tests.forked import end_if_stuck, fail_if_stuck
from training import distributed, recorder
from training.command_line import EXIT_BAD_INPUT, EXIT_LOST, run_command
from training.config import TrainConfig, parse_command_line
from training.distributed import ALONE, World, join
from training.errors import ConfigError
from training.precision import Compute

ROOT = Path(__file__).resolve().parents[2]
# 86 texts in batches of 7: the last has 2, one too few for three processes. Two batches per step, one in the last step.
OPTIONS = """
--train.batch-size 7 --train.accumulation-steps 2 --train.epochs 3 --train.log-every 1 --train.eval-batch-size 6
""".split()
NO_DROPOUT = "--model.hidden-dropout 0 --model.attention-dropout 0 --model.classifier-dropout 0".split()


@pytest.fixture(autouse=True)
def one_thread():
    """A fork has only one thread: torch must not wait for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_config(tiny_checkpoint, tiny_data):
    """With AdaLoRA, whose ranks must be the same in all processes, and P-tuning, whose network all drop in the end."""
    return write_tiny_config(tiny_checkpoint, tiny_data, more=True)


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Late imports happen now, once, instead of in every fork."""
    import datasets
    import sklearn.metrics

    return datasets, sklearn.metrics


def watch(real_step, seen, act):
    """`train_step` that records its batches and its messages; `act(step)` is called first."""

    def step(model, batches, *rest):
        act(len(seen["rows"]) + 1)
        seen["rows"].append([row for b in batches for row in b.indices[b.weights > 0].tolist()])
        seen["seeds"].append(torch.initial_seed())
        sent = len(seen["sent"])
        loss = real_step(model, batches, *rest)
        seen["step_messages"].append(seen["sent"][sent:])
        seen["weights"] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        return loss

    return step


def run_train(arguments, double=True, act=lambda step: None):
    """Run train.py's command and record it: (exit code, records)."""
    seen = {"rows": [], "seeds": [], "sent": [], "step_messages": [], "wrote": []}
    real_load, real_reduce = train_module.load_base, dist.all_reduce

    def all_reduce(tensor, *rest, **options):
        seen["sent"].append(tensor.nbytes)
        return real_reduce(tensor, *rest, **options)

    def audit(event, values):
        if event == "open" and str(values[0]).startswith(str(output)) and values[2] & (os.O_WRONLY | os.O_RDWR):
            seen["wrote"].append(str(values[0]))
        if event in ("os.mkdir", "os.rename", "shutil.rmtree") and str(values[0]).startswith(str(output)):
            seen["wrote"].append(str(values[0]))

    arguments = [str(one) for one in arguments]
    output = arguments[arguments.index("--output") + 1]
    sys.addaudithook(audit)
    dist.all_reduce = all_reduce
    if double:
        train_module.load_base = lambda *a, **o: real_load(*a, **o).double()
    # Drawing takes longer than the training.
    recorder.draw_plots = recorder.write_html_report = lambda folder: None
    train_module.train_step = watch(train_module.train_step, seen, act)
    with join() as world:
        code = run_command(lambda: train_module.train(parse_command_line(arguments), world), world)
    weights = b"".join(p.numpy().tobytes() for p in seen.pop("weights", []))
    return code, seen | {"weights": hashlib.sha256(weights).hexdigest()}


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def forks(size, work, folder):
    """Call `work(rank)`, which returns (exit code, something for JSON), in `size` processes of one run.

    Returns their wait statuses, and for each (what it returned, its stdout, its stderr).
    """
    folder.mkdir(exist_ok=True)
    # As under torchrun, the store outlives each of the processes.
    store, pids = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                sys.stdout, sys.stderr = ((folder / f"{name}{rank}").open("w") for name in ("out", "err"))
                end_if_stuck()
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
                names |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
                os.environ.update({name: str(value) for name, value in names.items()})
                code, seen = work(rank)
                (folder / f"seen{rank}").write_text(json.dumps(seen))
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                raise
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    results = []
    for rank in range(size):
        seen = folder / f"seen{rank}"
        out, err = ((folder / f"{name}{rank}").read_text() for name in ("out", "err"))
        fail_if_stuck(err)
        results.append((json.loads(seen.read_text()) if seen.exists() else None, out, err))
        seen.unlink(missing_ok=True)
    return [os.waitstatus_to_exitcode(status) for status in statuses], results


def outcome(folder):
    """The results of a run, except times, memory and settings."""
    report = json.loads((folder / "report.json").read_text())
    for name in ("train_seconds", "seconds", "peak_memory_bytes", "test_texts_per_second", "config"):
        del report[name]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    weights = {}
    for path in sorted((folder / "adapter").rglob("adapter_model.safetensors")):
        weights |= load_file(path)
    return report, lines, weights


def assert_same_run(found, expected):
    """Counts and decisions are equal, losses and weights to 1e-10, values from the float32 logits to 1e-6."""
    (report, lines, weights), (expected_report, expected_lines, expected_weights) = found, expected
    for name in ("best_epoch", "epochs_run", "steps", "complete", "ranks"):
        assert report[name] == expected_report[name]
    for split in ("test", "validation"):
        assert report[split]["confusion"] == expected_report[split]["confusion"]
        assert report[split]["loss"] == pytest.approx(expected_report[split]["loss"], rel=1e-6)
        for name in ("accuracy", "precision", "recall", "f1", "per_class"):
            assert report[split][name] == expected_report[split][name]
    assert [m["text"] for m in report["mistakes"]] == [m["text"] for m in expected_report["mistakes"]]
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        rel = 1e-6 if "split" in line else 1e-10
        assert line == {
            name: pytest.approx(value, rel=rel, abs=0) if name == "loss" else value
            for name, value in expected_line.items()
        }
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float64
        assert (weight - expected_weights[name]).norm() <= 1e-10 * expected_weights[name].norm(), name


@pytest.fixture
def alone(tiny_config, tmp_path):
    """The outcome of one process without dropout in float64, and the rows of each of its steps."""
    arguments = [tiny_config, *OPTIONS, *NO_DROPOUT, "--output", tmp_path / "alone"]
    (code,), [(seen, _, err)] = forks(1, lambda rank: run_train(arguments), tmp_path / "alone-seen")
    assert code == 0, err
    assert seen["sent"] == []
    return outcome(tmp_path / "alone"), seen["rows"]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def check_partition(results, rows):
    """Each step's rows are those of a single process, each in one share; all processes end with the same bits."""
    assert len(rows) == 3 * 7 and sorted(joined(rows[:7])) == list(range(86))
    for step, expected in enumerate(rows):
        shares = [seen["rows"][step] for seen, _, _ in results]
        assert sorted(joined(shares)) == sorted(expected)
    assert len({seen["weights"] for seen, _, _ in results}) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_equal_one(alone, tiny_config, tmp_path, size):
    expected, rows = alone
    arguments = [tiny_config, *OPTIONS, *NO_DROPOUT, "--output", tmp_path / "several"]
    codes, results = forks(size, lambda rank: run_train(arguments), tmp_path / "seen")
    assert codes == [0] * size, results
    assert_same_run(outcome(tmp_path / "several"), expected)
    check_partition(results, rows)
    ranks = {key: len(tensor) for key, tensor in expected[2].items() if key.endswith("lora_E")}
    assert {f"base_model.model.{name}.lora_E": rank for name, rank in expected[0]["ranks"].items()} == ranks
    trainable = expected[0]["trainable_parameters"]
    for seen, _, _ in results:
        # However many batches a step has: one message of its gradients and its loss (here of 8 bytes each).
        assert seen["step_messages"] == [[8 * (trainable + 1)]] * len(rows)
        # In addition 16 bytes per step and after each epoch, and messages once per epoch or run.
        others = len(seen["sent"]) - len(rows)
        assert sum(seen["sent"]) - 8 * (trainable + 1) * len(rows) <= 16 * (len(rows) + 3) + 400 * 3 + 100 and others
    (main, out, err), *others = results
    assert f"in each of {size} processes" in out and "test accuracy" in out and err == ""
    assert any("checkpoint" in path for path in main["wrote"])
    for other, other_out, other_err in others:
        assert (other["wrote"], other_out, other_err) == ([], "", "")


@pytest.mark.parametrize("method", ["adamatch", "softmatch"])
def test_unlabelled_texts_get_the_same_labels_in_several_processes(tiny_config, tmp_path, method):
    """Their means and moving averages are those of all processes; some processes have no text of a batch."""
    tiny_config.write_text(f'{tiny_config.read_text()}[unlabelled]\nmethod = "{method}"\nratio = 2\n')
    options = [tiny_config, *OPTIONS, *NO_DROPOUT, "--data.train-rows", 36, "--train.epochs", 2]
    outcomes = []
    for size in (1, 3):
        arguments = [*options, "--output", tmp_path / f"run{size}"]
        codes, results = forks(size, lambda rank: run_train(arguments), tmp_path / "seen")  # noqa: B023  called at once
        assert codes == [0] * size, results
        outcomes.append(outcome(tmp_path / f"run{size}"))
    assert_same_run(*outcomes[::-1])


KILLED = """
import os, signal, sys
from tests.training.test_distributed import run_train
from training.distributed import World

def die(step):
    if os.environ["RANK"] == "1" and step == 12:
        os.kill(os.getpid(), signal.SIGKILL)

def signalled(self, line, report=World.report_error):  # as early as torchrun could, which also noticed
    os.kill(os.getpid(), signal.SIGTERM)
    report(self, line)

World.report_error = signalled

sys.exit(run_train(sys.argv[1:], act=die)[0])
"""


def test_a_process_that_dies_ends_the_run_which_resumes_with_another_number(alone, tiny_config, tmp_path):
    expected, rows = alone
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    arguments = [tiny_config, *OPTIONS, *NO_DROPOUT, "--output", tmp_path / "cut", "--train.checkpoint-steps", 4]
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port()), script]
        + [str(one) for one in arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    seconds = time.monotonic() - started
    assert result.returncode != 0 and seconds < 60, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "another process of this run died" in errors[0] and "--resume" in errors[0]
    assert "Signal 9 (SIGKILL)" in result.stderr  # torchrun's own report names who died
    assert not (tmp_path / "cut" / "report.json").exists()
    assert [path.name for path in (tmp_path / "cut" / "checkpoint").glob("step-*")]

    codes, results = forks(3, lambda rank: run_train([*arguments, "--resume"]), tmp_path / "seen")
    assert codes == [0, 0, 0], results
    assert "resumed     epoch 2, after step 8" in results[0][1]
    assert_same_run(outcome(tmp_path / "cut"), expected)
    for step, expected_rows in enumerate(rows[8:]):
        shares = [seen["rows"][step] for seen, _, _ in results]
        assert sorted(joined(shares)) == sorted(expected_rows)
    assert len({seen["weights"] for seen, _, _ in results}) == 1


def test_dropout_differs_and_a_stopped_run_resumes_with_the_same_bits(tiny_config, tmp_path):
    """With TMix, whose mixes differ too."""
    arguments = [tiny_config, *OPTIONS, "--lora.dropout", 0.2, "--train.tmix", 0.5, "--train.log-every", 4, "--output"]
    codes, uninterrupted = forks(
        2, lambda rank: run_train([*arguments, tmp_path / "uninterrupted"], double=False), tmp_path / "seen"
    )
    assert codes == [0, 0], uninterrupted
    seeds = joined(seen["seeds"] for seen, _, _ in uninterrupted)
    assert len(set(seeds)) == len(seeds) == 2 * 21  # no two processes, no two steps

    def stop_other(step):
        if step == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    cut = [*arguments, tmp_path / "cut"]
    codes, results = forks(2, lambda rank: run_train(cut, double=False, act=stop_other), tmp_path / "seen")
    assert codes == [143, 143] and [len(seen["rows"]) for seen, _, _ in results] == [5, 5]
    assert "interrupted in epoch 1 after step 5" in results[0][1] and "--resume" in results[0][1]
    codes, results = forks(2, lambda rank: run_train([*cut, "--resume"], double=False), tmp_path / "seen")
    assert codes == [0, 0], results
    assert "step    20/21" in results[0][1]  # steps that were not yet logged before the stop count once
    (report, lines, weights), (expected_report, expected_lines, expected) = map(
        outcome, (cut[-1], tmp_path / "uninterrupted")
    )
    assert (report, lines) == (expected_report, expected_lines)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {seen["weights"] for seen, _, _ in results} == {seen["weights"] for seen, _, _ in uninterrupted}


def test_a_hanging_process_times_out_but_a_slow_checkpoint_does_not(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_LOST_AFTER", datetime.timedelta(seconds=5))
    real_save = recorder.save
    arguments = [tiny_config, *OPTIONS, "--train.checkpoint-steps", 2, "--output", tmp_path / "run"]

    def work(rank):
        def slow_save(*rest):
            time.sleep(6)  # only process 0 writes, and the others wait for longer than they would in a step
            real_save(*rest)

        def hang(step):
            if rank == 1 and step == 4:
                while not (tmp_path / "seen" / "seen0").exists():  # until the other has given up
                    time.sleep(0.05)

        recorder.save = slow_save
        return run_train(arguments, act=hang)

    codes, results = forks(2, work, tmp_path / "seen")
    assert codes[0] == EXIT_LOST
    assert "no longer responds" in results[0][2] and results[0][2].count("\n") == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--train.learning-rate", 1e30], "the loss is"),
        (["--data.test-file", "nowhere.csv"], "nowhere.csv"),
        (["--train.epochs", -1], "train.epochs is -1"),
    ],
)
def test_an_error_in_several_processes_is_one_line(tiny_config, tmp_path, more, line):
    arguments = [tiny_config, *more, "--output", tmp_path / "run"]
    codes, results = forks(2, lambda rank: run_train(arguments), tmp_path / "seen")
    assert EXIT_BAD_INPUT in codes and set(codes) <= {EXIT_BAD_INPUT, EXIT_LOST}
    errors = "".join(err for _, _, err in results)
    assert line in errors and errors.count("\n") == 1 and errors.startswith("error: ")


def test_the_error_is_written_for_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    ALONE.report_error("error: a line")
    assert capsys.readouterr().err == "error: a line\n"
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: a line"


class _Net(torch.nn.Module):
    """Two logits from the mean token id; `overflow` makes the gradients inf."""

    def __init__(self):
        super().__init__()
        self.layer, self.overflow = torch.nn.Linear(1, 2), False

    def forward(self, input_ids, attention_mask):
        logits = self.layer(input_ids.float().mean(dim=1, keepdim=True))
        return logits * torch.tensor(float("inf")) if self.overflow else logits


def test_an_overflow_in_one_process_skips_the_step_in_all(tmp_path):
    def work(rank):
        torch.manual_seed(0)
        model = _Net()
        optimizer = train_module.make_optimizer(model, TrainConfig(learning_rate=0.1))
        schedule = train_module.make_schedule(optimizer, 10, 0)
        scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**10)
        split = _split([3] * 5)
        seen = []
        with join() as world:
            for number, rows in enumerate(([0, 1, 2, 3], [4, 0, 1], [2])):  # of the last, process 1 has none
                model.overflow = number == 1 and rank == 1
                batch = collate(split, np.array(rows), 1, "longest", world.share)
                cpu = Compute(torch.device("cpu"), "fp32")
                loss = train_module.train_step(model, [batch], optimizer, schedule, scaler, cpu, 1.0, world)
                weights = [p.tolist() for p in model.parameters()]
                seen.append([weights, scaler.get_scale(), schedule.last_epoch, repr(loss.item())])
        return 0, seen

    codes, results = forks(2, work, tmp_path / "seen")
    assert codes == [0, 0], results
    (first, _, _), (second, _, _) = results
    assert first == second
    assert [entry[1:3] for entry in first] == [[2.0**10, 1], [2.0**9, 1], [2.0**9, 2]]
    assert first[0][0] == first[1][0] != first[2][0]


def _split(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32) % 7 + 3
    return EncodedSplit(ids, offsets, np.arange(len(lengths)) % 2, 20, 0)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    size=st.integers(1, 12),
    epoch=st.integers(0, 3),
)
def test_rows_are_divided_without_loss_or_duplicate(lengths, batch_size, size, epoch):
    split, worlds = _split(lengths), [World(rank, size) for rank in range(size)]
    plan = bucketed_batches(split.lengths, batch_size, 0, epoch)
    shared = [list(training_batches(split, batch_size, 1, 0, epoch, share=world.share)) for world in worlds]
    assert {len(batches) for batches in shared} == {len(plan)}  # every process makes every step
    for rows, parts in zip(plan, zip(*shared, strict=True), strict=True):
        found = [row for part in parts for row in part.indices[part.weights > 0].tolist()]
        assert sorted(found) == sorted(rows.tolist())
        for part in parts:
            assert len(part.labels) >= 1 and part.total_weight == len(rows)
            assert part.tokens == split.lengths[rows].sum()
        held = [int((part.weights > 0).sum()) for part in parts]
        assert max(held) - min(held) <= 1
    scored = joined(evaluation_batches(split, batch_size, 1, share=world.share) for world in worlds)
    assert sorted(joined(batch.indices.tolist() for batch in scored)) == list(range(len(lengths)))


def test_roberta_base_sends_less_than_four_megabytes_per_step(monkeypatch):
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(label_names=("a", "b", "c", "d")))
        inject_lora(model, LoRAConfig(rank=6, alpha=14, target_modules=("query", "key", "value")))
    assert count_parameters(model).trainable == 925_444
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *rest, **options: sent.append(tensor.nbytes))
    World(0, 64).sum_gradients(model.parameters(), torch.zeros((), device="meta"))
    assert sent == [4 * (925_444 + 1)] and sent[0] + 16 < 4_000_000


def test_alone_nothing_is_sent_and_nothing_seeded(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    net, before = _Net(), torch.get_rng_state()
    ALONE.seed(0, 1), ALONE.wait(), ALONE.copy_from_main(net), ALONE.check_same_step(7)
    loss = torch.ones(())
    assert ALONE.sum_gradients([], loss) is loss and ALONE.sum(loss) is loss and ALONE.all_reduce_max(3, 0) == (3, 0)
    assert torch.equal(before, torch.get_rng_state())
    with join() as world:
        assert world is ALONE


def test_processes_at_different_steps_are_refused(monkeypatch):
    monkeypatch.setattr(World, "all_reduce_max", lambda self, *values: (12, 0))  # another is at 12, and another at 0
    with pytest.raises(ConfigError, match="at step 12, another at step 0.*--output"):
        World(0, 2).check_same_step(12)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for gpus in (2, 3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        if gpus == 2:
            World(1, 3).take_gpu("cpu")
            with pytest.raises(ConfigError, match="3 processes on a machine with 2 GPU.*--train.device cpu"):
                World(1, 3).take_gpu("auto")
    World(1, 3).take_gpu("auto")
    assert taken == [1]
