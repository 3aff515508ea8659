"""The committed configurations, compared with the published experiment and with parameter arithmetic."""

import dataclasses
import re
from pathlib import Path

import pytest

from experiments.grid import expand, plan
from experiments.table import Arguments, _trainable, make_table
from lora.config import METHODS
from roberta.config import PUBLISHED
from training.budget import trainable_parameters

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "agnews"
QKV, OUT = ("query", "key", "value"), "attention.output.dense"

# Reported rows: model, rank, alpha, targets, accuracy; and trainable parameters, computed by lora/budget.py.
ROWS = {
    "base_r4_a32_qkv_intermediate": ("base", 4, 32, (*QKV, "intermediate.dense"), "84.375", 999_172),
    "base_r4_a32_qkv": ("base", 4, 32, QKV, "84.375", 814_852),
    "large_r4_a32_qkv_attention_output": ("large", 4, 32, (*QKV, OUT), "84.525", 1_840_132),
    "large_r8_a32_qkv": ("large", 8, 32, QKV, "85.025", 2_233_348),
    "large_r8_a16_qkv_attention_output": ("large", 8, 16, (*QKV, OUT), "85.050", 2_626_564),
    "large_r8_a16_qkv_attention_output_again": ("large", 8, 16, (*QKV, OUT), "85.200", 2_626_564),
    "base_r4_a32_qv": ("base", 4, 32, ("query", "value"), "85.150", 741_124),
    "base_r6_a14_qkv": ("base", 6, 14, QKV, "84.725", 925_444),
}


def test_all_eight_rows_are_there():
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_was_reported(name):
    size, rank, alpha, targets, accuracy, trainable = ROWS[name]
    path = FOLDER / f"{name}.toml"
    (config,) = expand(path, {}).values()
    assert config.model.checkpoint == f"roberta-{size}"
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (rank, alpha, targets)
    train = config.train
    assert (train.learning_rate, train.weight_decay, train.epochs, train.patience) == (5e-4, 0.01, 20, 3)
    assert train.batch_size == (32 if size == "base" else 16)
    assert (config.data.max_length, config.data.padding, config.data.source) == (128, "longest", "ag_news")
    assert _trainable(config) == trainable
    assert train.max_trainable == (1_000_000 if trainable <= 1_000_000 else None)
    comment = path.read_text()
    assert f"{accuracy} %" in comment and f"{trainable:,} trainable" in comment


def test_the_row_listed_twice_differs_only_by_its_seeds():
    name = "large_r8_a16_qkv_attention_output"
    runs = plan([FOLDER / f"{name}.toml", FOLDER / f"{name}_again.toml"], {}, seeds=3)
    assert len({run.config.train.seed for run in runs}) == 6


def test_variants_of_large_are_within_the_limit_and_state_their_count():
    files = sorted((FOLDER / "within_budget").glob("*.toml"))
    assert len(files) == 3
    for path in files:
        (config,) = expand(path, {}).values()
        assert config.model.checkpoint == "roberta-large" and config.train.max_trainable == 1_000_000
        trainable = _trainable(config)
        assert trainable <= 1_000_000 and f"{trainable:,} trainable" in path.read_text()


def test_the_search_space_is_complete():
    configs = expand(FOLDER / "search" / "space.toml", {}).values()
    assert len(configs) == 4 * 4 * 3 * 2 * 2 * 2 * 2
    assert {config.lora.rank for config in configs} == {4, 6, 8, 12}
    assert {config.lora.alpha for config in configs} == {8, 14, 16, 32}
    assert {config.data.padding for config in configs} == {"longest", "max_length"}


def test_the_plan_shows_each_row_and_whether_it_is_within_the_limit(capsys, tmp_path):
    assert make_table(Arguments((FOLDER,), output=tmp_path / "table", plan=True)) == 0
    shown = capsys.readouterr().out
    for name, (*_, trainable) in ROWS.items():
        verdict = "yes" if trainable <= 1_000_000 else "no"
        assert re.search(rf"^{name} +{trainable:,} +{verdict}$", shown, re.MULTILINE), name
    assert not (tmp_path / "table").exists()


def test_every_method_has_a_file_within_each_budget():
    eight = dataclasses.replace(PUBLISHED["minilm"], label_names=tuple("abcdefgh"))
    within: dict[int, set[str]] = {182_000: set(), 300_000: set()}
    for run in plan([FOLDER.parent / "methods"], {}, seeds=1):
        trained = trainable_parameters(eight, run.config.methods)
        assert trained <= run.config.train.max_trainable
        for budget, tables in within.items():
            if trained <= budget:
                tables |= {method.table for method in run.config.methods}
    assert within[182_000] == within[300_000] == set(METHODS)


def test_every_method_has_base_and_large_within_a_million_with_the_counts_in_docs():
    (reference,) = expand(FOLDER / "base_r6_a14_qkv.toml", {}).values()
    page = (FOLDER.parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    section = page.partition("## Base and large within a million")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.+)", section, re.MULTILINE))
    counts: dict[str, list[str]] = {}
    methods: dict[str, set[str]] = {"roberta-base": set(), "roberta-large": set()}
    for run in plan([FOLDER.parent / "million"], {}, seeds=1):  # sorted: base before large
        trained = _trainable(run.config)
        assert trained <= 1_000_000 and run.config.train.max_trainable == 1_000_000
        assert run.config.data == reference.data
        counts.setdefault(run.name.rpartition("_")[0], []).append(f"{trained:,}")
        methods[run.config.model.checkpoint] |= {method.table for method in run.config.methods}
    assert methods["roberta-base"] == methods["roberta-large"] == set(METHODS)
    assert {name: re.findall(r"\d+,[\d,]*\d", row) for name, row in rows.items()} == counts
