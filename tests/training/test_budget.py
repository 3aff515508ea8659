"""The budget is checked on shapes alone, and its error names the largest rank that fits."""

import dataclasses

import pytest

from lora.config import BottleneckConfig, LoRAConfig
from roberta.config import RobertaConfig
from training.budget import check_budget, trainable_parameters
from training.errors import ConfigError

BASE = RobertaConfig(label_names=("World", "Sports", "Business", "Sci/Tech"))
LARGE = dataclasses.replace(
    BASE, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


def test_final_model_of_the_reference_is_within_a_million():
    lora = LoRAConfig(rank=6, alpha=14)
    assert trainable_parameters(BASE, [lora]) == 925_444
    check_budget(BASE, [lora], 1_000_000)


def test_over_budget_names_the_largest_rank_that_fits():
    with pytest.raises(ConfigError, match="largest rank that fits is 7$") as error:
        check_budget(BASE, [LoRAConfig(rank=8)], 1_000_000)
    assert "\n" not in str(error.value)
    check_budget(BASE, [LoRAConfig(rank=7)], 1_000_000)


def test_over_budget_names_the_smallest_reduction_factor_that_fits():
    with pytest.raises(ConfigError, match="488,196 over .* the smallest reduction_factor that fits is 35$"):
        check_budget(BASE, [BottleneckConfig()], 1_000_000)
    check_budget(BASE, [BottleneckConfig(reduction_factor=35)], 1_000_000)
    with pytest.raises(ConfigError, match="no reduction_factor fits"):
        check_budget(BASE, [BottleneckConfig()], 600_000)


def test_no_rank_fits_beside_the_large_head():
    with pytest.raises(ConfigError, match="no rank fits"):
        check_budget(LARGE, [LoRAConfig(rank=1)], 1_000_000)


def test_exactly_the_budget_is_allowed():
    check_budget(BASE, [LoRAConfig(rank=6)], 925_444)
    with pytest.raises(ConfigError):
        check_budget(BASE, [LoRAConfig(rank=6)], 925_443)
