"""Adapters on disk, both ways: what we save peft loads, what peft saves we load, with the same logits."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.config import LoRAConfig, LoRAError
from lora.inject import inject_lora, merge_lora
from lora.peft_format import adapter_shapes, load_adapter, read_adapter_config, save_adapter
from tests.parity.oracle import (
    adapted_pair,
    assert_close,
    assert_same,
    our_copy,
    our_name,
    ragged_batch,
    reference_model,
)

CONFIGS = {
    "final model": LoRAConfig(rank=6, alpha=14, dropout=0.1),
    "every matrix, rsLoRA": LoRAConfig(
        rank=3, alpha=8, use_rslora=True, target_modules=("query", "key", "value", "output.dense", "intermediate.dense")
    ),
    "regex": LoRAConfig(rank=2, target_modules=r".*layer\.1.*(value|output\.dense)"),
    "one layer": LoRAConfig(rank=2, layers_to_transform=(1,)),
    "one layer of a named list": LoRAConfig(rank=2, layers_to_transform=(1,), layers_pattern=("layer",)),
    "every linear layer but two": LoRAConfig(
        rank=2, target_modules="all-linear", exclude_modules=("key", "attention.output.dense")
    ),
    "patterns": LoRAConfig(rank=4, rank_pattern={"query": 2}, alpha_pattern={"layer.1.attention.self.value": 3.0}),
    "biases of adapted layers": LoRAConfig(rank=2, bias="lora_only", target_modules=("query", "output.dense")),
    "all biases": LoRAConfig(rank=2, bias="all"),
    "more modules trained in full": LoRAConfig(rank=2, modules_to_save=("classifier", "embeddings.LayerNorm")),
}
BATCH = ragged_batch([17, 1, 9])


def ours_logits(model):
    with torch.no_grad():
        return model.eval()(BATCH["input_ids"], BATCH["attention_mask"])


def peft_logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


def randomise_biases(ours, theirs):
    """Move the trained biases away from the checkpoint's, on both sides alike: else forgetting them would not show."""
    generator = torch.Generator().manual_seed(7)
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and name.endswith("bias") and our_name(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
                mine[our_name(name)].copy_(parameter)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_loads_what_we_save(tmp_path, config):
    ours, theirs = adapted_pair(tmp_path / "base", config, dtype=torch.float32)
    randomise_biases(ours, theirs)
    save_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path / "base"), task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing keys and of a damaged configuration
        loaded = peft.PeftModel.from_pretrained(reference_model(), tmp_path / "adapter")
    assert_close(peft_logits(loaded), ours_logits(ours), 1e-5, "logits")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_we_load_what_peft_saves(tmp_path, config):
    ours, theirs = adapted_pair(tmp_path / "base", config, dtype=torch.float32)
    randomise_biases(ours, theirs)
    expected = peft_logits(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    fresh = our_copy(reference_model(), tmp_path / "again", torch.float32)
    (loaded,) = load_adapter(fresh, tmp_path / "adapter")
    assert_close(ours_logits(fresh), expected, 1e-5, "logits")
    assert loaded.rank == config.rank and loaded.use_rslora == config.use_rslora and loaded.bias == config.bias


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_hold_the_same_keys_and_settings_as_pefts(tmp_path, config):
    ours, theirs = adapted_pair(tmp_path / "base", config, dtype=torch.float32)
    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    others = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    kept = {key for key in others if ".original_module." not in key and ".modules_to_save." not in key}
    assert_same(set(mine), kept, "keys")
    for key, tensor in mine.items():
        assert_same(tensor, others[key], key)
    settings, reference = (
        json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")
    )
    reference["modules_to_save"] = [name for name in reference["modules_to_save"] if name != "score"]
    for field, value in settings.items():
        if field == "base_model_name_or_path":
            continue
        if value == "all-linear":  # peft writes the names of the layers, those of the head among them
            assert {"classifier.dense", "classifier.out_proj"} < set(reference[field])
            continue
        ordered = sorted if isinstance(value, list) else lambda same: same  # peft keeps sets
        assert_same(ordered(value), ordered(reference[field]), field)


def test_the_order_of_overlapping_patterns_survives(tmp_path):
    """The first pattern that matches counts. peft sorts them when it saves, and so changes such an adapter itself."""
    overlapping = {"output.dense": 2, "attention.output.dense": 20}
    config = LoRAConfig(
        rank=4, target_modules=("query", "output.dense"), rank_pattern=overlapping, alpha_pattern=overlapping
    )
    ours, theirs = adapted_pair(tmp_path / "base", config, dtype=torch.float32)
    assert_close(ours_logits(ours), peft_logits(theirs), 1e-5, "logits in memory")
    save_adapter(ours, tmp_path / "adapter", task_type="SEQ_CLS")
    again = our_copy(reference_model(), tmp_path / "again", torch.float32)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(ours_logits(again), ours_logits(ours))
    opened = peft.PeftModel.from_pretrained(reference_model(), tmp_path / "adapter")
    assert_close(peft_logits(opened), ours_logits(ours), 1e-5, "logits that peft gives")


@pytest.fixture
def saved(tmp_path):
    """A base model and an adapter folder on disk, written by us."""
    config = LoRAConfig(rank=2, bias="lora_only")
    ours, _ = adapted_pair(tmp_path / "base", config, dtype=torch.float32)
    save_adapter(ours, tmp_path / "adapter")
    return our_copy(reference_model(), tmp_path / "again", torch.float32), tmp_path / "adapter"


@pytest.mark.parametrize(
    "lost", ["classifier.out_proj.weight", "0.attention.self.query.lora_A", "0.attention.self.key.base_layer.bias"]
)
def test_a_missing_tensor_is_an_error_that_names_it(saved, lost):
    model, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if lost not in key}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match="lacks") as error:
        load_adapter(model, folder)
    assert lost.split(".")[-2] in str(error.value) and "\n" not in str(error.value)


def test_an_unexpected_tensor_is_an_error_that_names_it(saved):
    model, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.roberta.nonsense.weight"] = torch.zeros(1)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match=r"unexpected.*roberta\.nonsense"):
        load_adapter(model, folder)


def test_a_wrong_shape_is_an_error_that_gives_both(saved):
    model, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.classifier.out_proj.weight"
    tensors[key] = torch.zeros(5, 24)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match=r"out_proj.weight \(\[5, 24\], not \[3, 24\]\)"):
        load_adapter(model, folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_a_broken_weight_file_is_an_error_that_names_it(saved, content):
    model, folder = saved
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(LoRAError, match=r"adapter_model.safetensors: not a complete safetensors file"):
        load_adapter(model, folder)


def test_nothing_is_loaded_into_merged_adapters(saved):
    model, folder = saved
    load_adapter(model, folder)
    merge_lora(model)
    before = ours_logits(model)
    with pytest.raises(RuntimeError, match="merged; unmerge them"):
        load_adapter(model, folder)
    assert torch.equal(ours_logits(model), before)


def test_a_truncated_weight_file_is_an_error(saved):
    model, folder = saved
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LoRAError, match="not a complete safetensors file"):
        load_adapter(model, folder)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("field", ["fan_in_fan_out", "layer_replication", "target_parameters", "something_of_tomorrow"])
def test_an_unknown_field_is_accepted_when_off_and_refused_by_name_when_on(saved, field):
    model, folder = saved
    for off in (False, None, 0, [], {}, ""):
        edit(folder, **{field: off})
        read_adapter_config(folder, model)
    edit(folder, **{field: True})
    with pytest.raises(LoRAError, match=rf"{field} = true is not supported"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"r": 0}, "config.json: rank is 0"),
        ({"exclude_modules": 3}, "exclude_modules is '3'; it must be a list of names"),
        ({"r": "two"}, "r is 'two'; it must be a number"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform is .*; it must be a list of layer numbers"),
        ({"rank_pattern": {"query": "2"}}, "rank_pattern is .*; it must be numbers by name"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; it must be true or false"),
        ({"r": 1 << 30}, r"has the wrong shape in .*lora_A.weight \(\[2, 24\], not \[1073741824, 24\]\)"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["nothing"]}, "target_modules matches no linear layer"),
        ({"target_modules": ["query", "value"]}, "holds unexpected .*self.key.lora_A.weight"),
        ({"exclude_modules": ".*query"}, "holds unexpected .*self.query.lora_A.weight"),
        ({"target_modules": "all-linear", "bias": "none"}, r"lacks .*layer.0.attention.output.dense.lora_A.weight"),
    ],
)
def test_settings_that_can_not_be_used_are_named(saved, fields, says):
    model, folder = saved
    edit(folder, **fields)
    with pytest.raises(LoRAError, match=says):
        load_adapter(model, folder)


def test_every_default_of_the_installed_peft_is_accepted(tmp_path):
    peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]).save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path).rank == 2


@pytest.mark.parametrize(("written", "read"), [(1, (1,)), ([0, 1], (0, 1)), ([], None), (None, None)])
def test_layers_to_transform_as_peft_writes_them(saved, written, read):
    model, folder = saved
    edit(folder, layers_to_transform=written)
    assert read_adapter_config(folder, model).layers_to_transform == read


# The fields that peft 0.10 writes, with the values of its defaults.
PEFT_0_10 = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "roberta-base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 14,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,  # although the head is in the file
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["value", "query", "key"],
    "task_type": "SEQ_CLS",
    "use_dora": False,
    "use_rslora": False,
}


def test_settings_of_peft_0_10_load(saved):
    model, folder = saved
    ours_config = LoRAConfig(rank=2, alpha=14)
    base = our_copy(reference_model(), folder.parent / "third", torch.float32)
    save_adapter(inject_lora(base, ours_config), folder)
    (folder / "adapter_config.json").write_text(json.dumps(PEFT_0_10))
    (loaded,) = load_adapter(model, folder)
    assert (loaded.rank, loaded.alpha, loaded.modules_to_save) == (2, 14, ("classifier",))


def test_biases_that_peft_0_10_forgets_to_save_are_told(saved):
    model, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: t for key, t in tensors.items() if "base_layer" not in key}, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="holds none of the biases that were trained"):
        load_adapter(model, folder)


def test_a_partly_trained_new_head_is_saved_whole(tmp_path):
    """Only out_proj is trained, the dense layer below it is random and frozen: without it the adapter is worthless."""
    config = LoRAConfig(rank=2, modules_to_save=("classifier.out_proj",))
    model = our_copy(reference_model(), tmp_path / "base", torch.float32)
    inject_lora(model, config)
    save_adapter(model, tmp_path / "adapter", task_type="SEQ_CLS", also=("classifier",))
    expected = ours_logits(model)
    other = our_copy(reference_model(), tmp_path / "other", torch.float32)
    with torch.no_grad():
        other.classifier.dense.weight.zero_()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(ours_logits(other), expected)
    base = reference_model()
    with torch.no_grad():
        base.classifier.dense.weight.zero_()
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_close(peft_logits(opened), expected, 1e-5, "peft reads the frozen part too")


def test_loading_into_a_model_with_other_adapters_is_refused(saved):
    model, folder = saved
    load_adapter(model, folder)
    load_adapter(model, folder)  # the same again is fine: this is how the best adapter comes back after training
    edit(folder, target_modules=["query"])
    with pytest.raises(LoRAError):
        load_adapter(model, folder)


def peft_adapter(folder, **settings):
    """peft's model with a random adapter, in float64; its logits; its file's tensors; whether its base is unchanged."""
    base = reference_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", **({"r": 2} | settings)))
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in model.base_model.model.state_dict().items()}
    unchanged = all(torch.equal(after.get(name, before[name]), before[name]) for name in before)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    model.save_pretrained(folder)
    return model, peft_logits(model), load_file(folder / "adapter_model.safetensors"), unchanged


def assert_loads_as(expected, folder):
    fresh = our_copy(reference_model(), folder.parent / "plain")
    load_adapter(fresh, folder)
    assert_close(ours_logits(fresh), expected, 1e-10, "logits")


INITS = [True, False, "gaussian", "eva", "orthogonal", "mica", "olora", "pissa", "pissa_niter_4"]


@pytest.mark.filterwarnings("ignore:.*(eva|EVA)")
@pytest.mark.parametrize("init", INITS)
def test_initialisations_that_leave_pefts_base_unchanged_are_loaded_and_no_others(tmp_path, init):
    settings = {"target_modules": ["query"], "init_lora_weights": init}
    _, expected, _, unchanged = peft_adapter(tmp_path / "adapter", **settings)
    if unchanged:
        assert_loads_as(expected, tmp_path / "adapter")
    else:
        with pytest.raises(LoRAError, match=f"init_lora_weights = '{init}' changes the base model"):
            load_adapter(our_copy(reference_model(), tmp_path / "plain"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": r".*layer\.0\..*|.*key"},
        {"target_modules": ["query", "nothing", "dense"], "exclude_modules": ["output.dense", "absent"]},
        {"target_modules": ["query", "dense"], "layers_to_transform": 1, "layers_pattern": "layer"},
        {"target_modules": r".*encoder.*layer.*attention.*self.*(query|value).*"},
    ],
    ids=str,
)
def test_settings_that_choose_layers(tmp_path, settings):
    assert_loads_as(peft_adapter(tmp_path / "adapter", **settings)[1], tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # peft's own
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_layer_is_told(tmp_path, field):
    settings = {"target_modules": ["query"], field: {"layer.0.*key": 9, "layer.0.*query": 7}}
    _, expected, _, _ = peft_adapter(tmp_path / "adapter", **settings)
    with pytest.warns(UserWarning, match=rf"adapter_config.json: {field} 'layer.0.*key' matches no adapted layer"):
        assert_loads_as(expected, tmp_path / "adapter")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize(
    "rename",
    {
        "compiled": lambda key: key.replace(".model.", ".model._orig_mod.", 1),
        "distributed": lambda key: key.replace(".model.", ".model.module.", 1),
        "the adapter distributed": lambda key: f"module.{key}",
        "sharded": lambda key: key.replace(".layer.", ".layer._fsdp_wrapped_module."),
        "peft 0.4 to 0.6": lambda key: key.replace(".base_layer.", "."),
    }.values(),
)
def test_keys_as_wrapped_models_and_early_versions_name_them(tmp_path, rename, bias):
    _, expected, tensors, _ = peft_adapter(tmp_path / "adapter", target_modules=["query", "output.dense"], bias=bias)
    renamed = {rename(key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors")
    assert_loads_as(expected, tmp_path / "adapter")
    shapes = adapter_shapes(tmp_path / "adapter")
    assert shapes["classifier.out_proj.weight"] == [3, 24]


def test_keys_of_a_state_dict_hold_the_name_of_the_adapter(tmp_path):
    model, expected, _, _ = peft_adapter(tmp_path / "adapter", target_modules=["query"])
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".default." in name for name in trained)
    save_file(trained, tmp_path / "adapter" / "adapter_model.safetensors")
    assert_loads_as(expected, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:.*holds none of the biases")
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (".roberta.", ".", r"expected .*roberta.encoder.layer.0.*, found .*model.encoder.layer.0.*without a head"),
        (
            ".roberta.",
            ".bert.",
            r"expected .*roberta.encoder.*, found .*bert.encoder.*class of model, with bert for roberta",
        ),
        (
            ".lora_A.",
            ".lora_A.mine.",
            r"expected .*key.lora_A.weight, found .*key.lora_A.mine.weight; .*its name in the keys",
        ),
    ],
)
def test_keys_of_another_model_name_the_likely_cause(saved, old, new, says):
    model, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace(old, new): t for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match=says) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)
