"""LoRA in any model: what is wrapped, what is trained, what is refused."""

import pytest
import torch
from torch import nn

from lora import (
    LoRAConfig,
    LoRAError,
    LoRALinear,
    adapters,
    count_parameters,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification


def roberta(layers=3):
    config = RobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=12,
    )
    return RobertaForSequenceClassification(config)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_default_trains_the_adapters_and_the_head_and_nothing_else():
    model = inject_lora(roberta(1), LoRAConfig(rank=2))
    path = "roberta.encoder.layer.0.attention.self"
    adapters = {f"{path}.{block}.{m}" for block in ("query", "key", "value") for m in ("lora_A", "lora_B")}
    head = {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")}
    assert trained(model) == adapters | head


def test_layers_ranks_and_alphas_by_pattern():
    config = LoRAConfig(
        rank=4,
        alpha=8,
        target_modules=("query", "output.dense"),
        layers_to_transform=(0, 2),
        rank_pattern={"attention.output.dense": 2, r"layer\.2.*query": 3},
        alpha_pattern={"query": 1.0},
    )
    model = inject_lora(roberta(), config)
    found = {
        name.removeprefix("roberta.encoder.layer."): (layer.rank, layer.scaling * layer.rank)
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
    }
    assert found == {
        "0.attention.self.query": (4, 1.0),
        "0.attention.output.dense": (2, 8),
        "0.output.dense": (4, 8),
        "2.attention.self.query": (3, 1.0),
        "2.attention.output.dense": (2, 8),
        "2.output.dense": (4, 8),
    }


def test_a_whole_name_needs_no_layer_number():
    whole = "roberta.encoder.layer.2.output.dense"
    model = inject_lora(roberta(), LoRAConfig(rank=2, target_modules=("query", whole), layers_to_transform=(0,)))
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert adapted == {"roberta.encoder.layer.0.attention.self.query", whole}


def test_all_linear_layers_but_those_excluded_and_the_head():
    config = LoRAConfig(
        target_modules="all-linear",
        exclude_modules=("self.key", "output.dense"),
        modules_to_save=("classifier.out_proj",),
    )
    model = inject_lora(roberta(1), config)
    adapted = {
        name.removeprefix("roberta.encoder.layer.0.") for name, m in model.named_modules() if hasattr(m, "lora_A")
    }
    assert adapted == {"attention.self.query", "attention.self.value", "intermediate.dense"}


def test_a_bias_of_query_is_trained_alone():
    model = inject_lora(roberta(1), LoRAConfig(rank=2, bias="lora_only", target_modules=("query",)))
    assert {name for name in trained(model) if "self" in name and "bias" in name} == {
        "roberta.encoder.layer.0.attention.self.query.base.bias"
    }


def test_adapters_change_the_output_of_attention():
    model = inject_lora(roberta(1), LoRAConfig(rank=2, target_modules=("value",))).eval()
    ids = torch.tensor([[0, 5, 6, 2]])
    before = model(ids, torch.ones_like(ids))
    with torch.no_grad():
        model.roberta.encoder.layer[0].attention.self.value.lora_B.fill_(1.0)
    assert not torch.allclose(model(ids, torch.ones_like(ids)), before)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": ("qeury",)}, "'qeury' matches no linear layer; there are query|attention.self.query"),
        ({"target_modules": ("query", "nothing")}, "'nothing' matches no linear layer"),
        ({"target_modules": r"layer\.9\..*"}, "matches no linear layer"),
        ({"target_modules": ("LayerNorm",)}, "a LayerNorm; lora adapts nn.Linear"),
        ({"target_modules": ("classifier.dense",)}, "'classifier.dense' matches no linear layer"),
        ({"modules_to_save": ("head",)}, "'head' matches no module; the model's parts are roberta, classifier"),
        ({"layers_to_transform": (1, 7)}, "no layer 7; the model has layers 0 to 2"),
        ({"layers_to_transform": (7,)}, "no layer 7"),
        ({"exclude_modules": ("nothing",)}, "exclude_modules: 'nothing' matches no module; there are query|attention"),
        ({"exclude_modules": ("roberta.encoder.layer.0", "query")}, "target_modules: 'query' matches no linear layer"),
        ({"target_modules": "all-linear", "exclude_modules": ".*dense|.*self.*"}, "'all-linear' matches no linear"),
        (
            {"rank_pattern": {"dense": 2}},
            "rank_pattern 'dense' matches no adapted layer; there are attention.self.query",
        ),
        ({"alpha_pattern": {"query": 2, "nothing": 2}}, "alpha_pattern 'nothing' matches no adapted layer"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_changes(fields, says):
    model = roberta()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(LoRAError, match=says) as error:
        inject_lora(model, LoRAConfig(**fields))
    assert "\n" not in str(error.value)
    assert [name for name, _ in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_injection_is_refused():
    model = inject_lora(roberta(), LoRAConfig())
    with pytest.raises(LoRAError, match="carries adapters already"):
        inject_lora(model, LoRAConfig())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern 'query' is 0"),
        ({"alpha_pattern": {"query": -1}}, "alpha_pattern 'query' is -1"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ".*query", "layers_to_transform": (1,)}, "layers_to_transform"),
        ({"layers_to_transform": ()}, "layers_to_transform is empty"),
        ({"target_modules": "all-linear", "layers_to_transform": (1,)}, "can't be combined with all-linear"),
        ({"layers_pattern": ("layer",)}, "layers_pattern has no effect without layers_to_transform"),
        ({"alpha_pattern": {"(?i)query": 1}}, r"'.*\(\?i\)query.*' is not a regular expression"),
    ],
)
def test_settings_out_of_range_are_refused(fields, says):
    with pytest.raises(LoRAError, match=says):
        LoRAConfig(**fields)


class Mixer(nn.Module):
    """Any model with linear layers, one of them without bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.relu(self.first(x)))))


def test_any_model_is_adapted_saved_loaded_and_merged(tmp_path):
    config = LoRAConfig(rank=2, target_modules=("first", "second"), modules_to_save=("head",), bias="lora_only")
    model = inject_lora(Mixer(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    x = torch.randn(5, 6)
    expected = model(x)
    save_adapter(model, tmp_path)
    fresh = Mixer()
    plain = {name.replace(".base.", "."): p for name, p in model.state_dict().items() if "lora_" not in name}
    fresh.load_state_dict(plain)
    with torch.no_grad():
        fresh.head.weight.zero_(), fresh.second.bias.zero_()
    assert load_adapter(fresh, tmp_path) == (config,)
    assert torch.equal(fresh(x), expected)
    merge_lora(fresh)
    plain = unload_lora(fresh)
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())
    torch.testing.assert_close(plain(x), expected)


def test_count_names_each_part_and_adds_up():
    model = inject_lora(roberta(), LoRAConfig(rank=2, target_modules=("query", "output.dense")))
    count = count_parameters(model)
    assert count.parts["LoRA on attention.self.query"] == (3 * 2 * (8 + 8),) * 2
    assert count.parts["LoRA on output.dense"] == (3 * 2 * (12 + 8),) * 2
    assert count.parts["LoRA on attention.output.dense"] == (3 * 2 * (8 + 8),) * 2
    assert count.parts["classifier.dense"] == (72, 72) and count.parts["roberta.encoder"][0] == 0
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.percentage == pytest.approx(100 * count.trainable / count.total)
    assert "all" in count.table().splitlines()[-1] and f"{count.trainable:,}" in count.table()


def test_a_shared_tensor_is_counted_once():
    model = Mixer()
    model.second.weight = model.first.weight
    assert count_parameters(model).total == 36 + 6 + 14


def test_a_rank_that_no_layer_can_have_changes_nothing():
    model = nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(5, 2)})
    config = LoRAConfig(rank=4, init="pissa", target_modules=("first", "second"), modules_to_save=())
    with pytest.raises(LoRAError, match="second has rank 4; it can be 2 at most"):
        inject_lora(model, config)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not adapters(model)
