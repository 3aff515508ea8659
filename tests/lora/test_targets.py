"""The rules by which names are meant, case by case; tests/parity/test_counts.py holds them against peft on models."""

import pytest

from lora.targets import layer_index, matches, pattern_value

PATH = "roberta.encoder.layer.11.attention.output.dense"


@pytest.mark.parametrize(
    ("targets", "name", "meant"),
    [
        (["dense"], PATH, True),
        (["output.dense"], PATH, True),
        (["attention.output.dense"], PATH, True),
        ([PATH], PATH, True),
        (["query", "dense"], PATH, True),
        (["put.dense"], PATH, False),  # not the end of a path, only of a word
        (["output"], PATH, False),
        ([], PATH, False),
        (r".*\.dense", PATH, True),
        (r"dense", PATH, False),  # an expression must match the whole name
        (r".*attention\.output", PATH, False),
        (r".*layer\.(3|11)\..*", PATH, True),
        (r".*layer\.1\..*", PATH, False),
    ],
)
def test_matches(targets, name, meant):
    assert matches(targets, name) is meant


@pytest.mark.parametrize(
    ("name", "number"),
    [(PATH, 11), ("encoder.layer.0.a", 0), ("model.layers.2.experts.5.up", 2), ("classifier.dense", None), ("0", None)],
)
def test_layer_index(name, number):
    assert layer_index(name) == number


def test_layer_index_of_a_named_list():
    name = "model.decoder.layers.3.experts.1.up"
    assert [layer_index(name, of) for of in ("layers", ("absent", "expert(s)?"), "up", "")] == [3, 1, None, 3]


def test_the_first_pattern_that_ends_the_name_counts():
    patterns = {"query": 1, r"layer\.11\..*dense": 2, "dense": 3, "attention": 4}
    assert pattern_value(patterns, PATH, 9) == 2
    assert pattern_value(patterns, "a.layer.1.dense", 9) == 3
    assert pattern_value(patterns, "a.subquery", 9) == 9  # the end of a word is not the end of a path
    assert pattern_value(patterns, "a.attention.b", 9) == 9
