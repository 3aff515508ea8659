"""Each lesson on a tiny model: it draws its plot, and its claim holds."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from data.batching import EncodedSplit
from experiments.lessons import (
    layer_updates,
    loss_scaling,
    merged,
    methods,
    quantization,
    scaling,
    singular_values,
    zero_start,
)
from experiments.lessons.common import Task, save_figure
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification


def texts(rows: int, seed: int) -> EncodedSplit:
    """Random texts of 3 to 12 tokens. The class is the second token modulo 2."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 13, rows)
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = random.integers(3, 12, offsets[-1]).astype(np.int32)
    return EncodedSplit(ids, offsets, ids[offsets[:-1] + 1].astype(np.int64) % 2, 12, 0)


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        label_names=("even", "odd"),
    )
    model = RobertaForSequenceClassification(config)
    return Task(model, texts(40, 0), texts(20, 1), 1, batch_size=4)


@pytest.fixture
def drawn(tmp_path):
    """A function of a lesson that writes its plot, checks the file and returns the numbers."""

    def draw(lesson):
        assert lesson.lines
        save_figure(lesson, tmp_path / "new" / "plot.png")
        assert (tmp_path / "new" / "plot.png").read_bytes()[:4] == b"\x89PNG"
        return lesson.found

    return draw


def test_both_zero_learns_nothing_and_b_zero_starts_at_the_pretrained_model(task, drawn):
    found = drawn(zero_start.lesson(task, steps=4))
    assert found["both zero"]["first"] == found["both zero"]["last"] == (0.0, 0.0)
    of_A, of_B = found["A random, B zero"]["first"]
    assert of_A == 0 and of_B > 0
    of_A, of_B = found["A zero, B random"]["first"]
    assert of_A > 0 and of_B == 0
    assert min(found["A random, B zero"]["last"]) > 0
    moved = [found[name]["moved"] > 1e-5 for name in zero_start.STARTS]  # smaller ones are rounding
    assert moved == [False, False, True, False]


def test_a_root_keeps_the_update_from_shrinking(task, drawn):
    found = drawn(scaling.lesson(task, steps=6, ranks=(1, 16)))
    assert found[False, 1] == found[True, 1]  # the square root of one
    assert found[True, 16]["scale"] == 4 * found[False, 16]["scale"]
    assert found[True, 16]["size"] > 1.5 * found[False, 16]["size"]


def test_an_update_of_rank_r_has_r_singular_values(task, drawn):
    spectra = drawn(singular_values.lesson(task, steps=4, ranks=(2, 5)))["spectra"]
    for rank in (2, 5):
        values = spectra[f"rank {rank}"]
        assert values[rank - 1] > 1e-5 > 10 * values[rank]
    assert spectra["all weights free"][5] > 1e-4  # no limit on the rank here


def test_every_matrix_of_every_layer_is_measured(task, drawn):
    found = drawn(layer_updates.lesson(task, steps=4))
    assert found["sizes"].shape == (2, 6) and (found["sizes"] > 0).all()


def test_merged_and_unmerged_differ_by_rounding_alone(task, drawn):
    found = drawn(merged.lesson(task, steps=3, number=2))
    assert found["float64"] < 1e-12
    for form in ("unmerged", "merged in fp32, then rounded", "rounded, then merged"):
        assert found["fp32", form] < 1e-5 < found["fp16", form] < 0.1
        assert found["fp16", form] < found["bf16", form] < 0.3


def test_scaling_the_loss_saves_gradients_from_underflow_and_too_much_of_it_breaks_them(task, drawn):
    # Gradients of a model this small are large: scales below 1 stand for a large model's 1.
    scales = (2.0**-20, 2.0**-12, 1.0, 2.0**32)
    found = drawn(loss_scaling.lesson(task, steps=2, scales=scales, start_scale=2.0**32, scaled_steps=3))
    zero = [found["fp16"][scale]["zero"] for scale in scales]
    assert zero[0] > zero[1] > zero[2] + 0.1
    assert found["fp32"]["zero"] <= zero[2]
    assert found["fp16"][scales[1]]["subnormal"] > found["fp16"][1.0]["subnormal"] + 0.1
    assert [found["fp16"][scale]["broken"] > 0 for scale in scales] == [False, False, False, True]
    assert found["trace"] == [2.0**31, 2.0**30, 2.0**29]
    assert found["formats"]["attention.self"] == "float16" and found["formats"]["attention.output"] == "float32"


def test_each_method_changes_w_in_its_own_form(task, drawn):
    found = drawn(methods.lesson(task, steps=4))
    assert found["LoRA"]["rank"] == 6 < found["PiSSA"]["rank"] <= 12
    assert 1 <= found["AdaLoRA"]["rank"] <= 6
    assert {found[method]["rank"] for method in ("DoRA", "VeRA", "(IA)³", "all weights")} == {16}
    assert found["PiSSA"]["inside"] > 0.95 > 0.9 > found["LoRA"]["inside"]
    assert found["(IA)³"]["angle"] < 1e-4 < 1e-3 < found["(IA)³"]["length"]
    assert found["BitFit"].keys() == found["head only"].keys() == {"trained", "accuracy"}  # W is as it was


def test_a_lesson_leaves_the_task_as_it_was_and_repeats_itself(task):
    before = [parameter.clone() for parameter in task.model.parameters()]
    lesson = partial(singular_values.lesson, steps=3, ranks=(2,))  # trains all weights too
    first = lesson(task).found["all weights free"]
    assert all(torch.equal(p, q) for p, q in zip(before, task.model.parameters(), strict=True))
    assert lesson(task).found["all weights free"] == first
    assert lesson(dataclasses.replace(task, seed=1)).found["all weights free"] != first


def test_fewer_bits_are_further_from_w_and_loftq_starts_nearer(task, drawn):
    found = drawn(quantization.lesson(task, steps=3, rank=4))
    error = {base: numbers["weights"] for base, numbers in found.items()}
    assert error["not quantized"] == 0 < error["8 bits"] < 0.02 < error["4 bits, LoftQ"] < 0.9 * error["4 bits"] < 0.2
    assert found["8 bits"]["logits"] < found["4 bits"]["logits"]
