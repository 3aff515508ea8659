"""Several adapters over one base against each alone and against peft's; the weighted sum of LoRA adapters."""

import copy

import peft
import pytest
import torch

from lora.adapter import adapters
from lora.config import BottleneckConfig, IA3Config, LayerNormConfig, LoRAConfig, VeRAConfig
from lora.errors import LoRAError
from lora.inject import inject_lora, merge_lora, own_parameters
from lora.peft_format import load_adapter, save_adapter
from lora.several import Several, Versions
from lora.weighted_sum import weighted_sum
from tests.parity.oracle import assert_close, assert_same, our_copy, ragged_batch, reference_model

BATCH = ragged_batch([17, 1, 9, 30, 12, 5])
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
NAMES = ["a", "b.2", "c", "f", "d", "e"]
CONFIGS = {
    "a": LoRAConfig(rank=3, alpha=8, target_modules=("query", "output.dense"), bias="lora_only"),
    "b.2": LoRAConfig(rank=5, alpha=4, target_modules=("query", "key"), use_dora=True, layers_to_transform=(1,)),
    "c": IA3Config(target_modules=("key", "intermediate.dense"), feedforward_modules=("intermediate.dense",)),
    "d": VeRAConfig(rank=4, modules_to_save=("classifier", "embeddings")),
    "e": LayerNormConfig(),
    "f": BottleneckConfig(),
}
LABELS = {"a": 3, "b.2": 5, "c": 2, "d": 3, "e": 4, "f": 3}


@torch.no_grad()
def randomized(model, seed):
    """Other values in all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.eval()


@pytest.fixture
def models(tmp_path):
    """One base, with an adapter of another method and a head of another size in each."""
    made = {name: our_copy(reference_model(num_labels=LABELS[name]), tmp_path / name) for name in CONFIGS}
    for model in made.values():
        model.roberta.load_state_dict(made["c"].roberta.state_dict())
        model.requires_grad_(False)
    return {name: randomized(inject_lora(model, CONFIGS[name]), i) for i, (name, model) in enumerate(made.items())}


@pytest.mark.parametrize("names", [NAMES, ["d", "d", "b.2", "b.2", "b.2", "b.2"], ["e"] * 6])
def test_each_row_is_computed_as_by_its_adapter_alone(models, names):
    alone = {name: model(**INPUTS) for name, model in models.items()}
    several = Several(models)
    logits = several(names, **INPUTS)
    assert_same(logits, several(names, *INPUTS.values()), "arguments by name or by position")
    for row, name in enumerate(names):
        assert_close(logits[row, : LABELS[name]], alone[name][row], what=name)
        assert bool((logits[row, LABELS[name] :] == -torch.inf).all()), "logits of classes that this adapter lacks"
    for name, model in models.items():
        assert_same(model(**INPUTS), alone[name], f"{name} alone, on the shared base")


def test_the_base_is_in_memory_once(models):
    several, wrapped = Several(models), {name: adapters(model) for name, model in models.items()}
    own = {name: own_parameters(model, wrapped[name]) for name, model in models.items()}
    for name in own["c"]:
        copies = {id(own[other][name]) for other in models if not own[other][name].requires_grad}
        assert len(copies) == (0 if name.startswith("classifier.") else 1), name
    numbers = {id(p): p.numel() for model in models.values() for p in model.parameters()}
    assert sum(p.numel() for p in several.parameters()) == sum(numbers.values())
    with pytest.raises(RuntimeError, match="other models use this layer too"):
        merge_lora(models["a"])


def test_what_does_not_fit_together_is_refused(models):
    several = Several(models)
    for names, says in [
        (["a"], "1 names of adapters for 6 rows"),
        (["a"] * 5 + ["x"], "no adapter 'x'; there are a, "),
    ]:
        with pytest.raises(LoRAError, match=says):
            several(names, **INPUTS)
    longer = Versions([torch.nn.Identity(), torch.nn.ZeroPad2d((0, 0, 1, 0))])
    longer.rows = [torch.tensor([0]), torch.tensor([1])]
    with pytest.raises(LoRAError, match="adapters that make sequences longer can't share a batch"):
        longer(torch.zeros(2, 3, 4))
    other = copy.deepcopy(models["c"])
    other.roberta.embeddings.word_embeddings.weight.data[5, 5] += 1e-9
    with pytest.raises(LoRAError, match=r"^b: roberta.embeddings.word_embeddings.weight is not that of the other"):
        Several({"a": models["a"], "b": other})


def pefts(tmp_path, head):
    """peft's model with three LoRA adapters on other layers, of other ranks; ours, loaded from its files."""
    settings = {
        "one": {"r": 3, "lora_alpha": 8, "target_modules": ["query", "output.dense"]},
        "two": {"r": 4, "lora_alpha": 4, "target_modules": ["query", "key"], "rank_pattern": {"layer.1.*query": 6}},
        "three": {"r": 2, "lora_alpha": 5, "target_modules": ["query", "value"]},
    }
    reference = reference_model().double()
    plain = copy.deepcopy(reference)
    saved = {"modules_to_save": ["out_proj"]} if head else {}  # in mixed batches peft takes linear layers alone
    configs = {name: peft.LoraConfig(**values, **saved, init_lora_weights=False) for name, values in settings.items()}
    theirs = peft.get_peft_model(reference, configs["one"], adapter_name="one")
    for name in ("two", "three"):
        theirs.add_adapter(name, configs[name])
    for name, parameter in theirs.double().named_parameters():
        if "modules_to_save" in name or "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = {name: our_copy(plain, tmp_path / name) for name in settings}
    for name, model in ours.items():
        load_adapter(model, tmp_path / "theirs" / name)
    return theirs.eval(), ours, plain


def test_a_mixed_batch_equals_pefts(tmp_path):
    theirs, ours, _ = pefts(tmp_path, head=True)
    names = ["three", "one", "one", "two", "three", "two"]
    logits = Several(ours)(names, **INPUTS)
    assert_close(logits, theirs(**INPUTS, adapter_names=names).logits, what="adapter_names")
    for row, name in enumerate(names):
        theirs.set_adapter(name)
        assert_close(logits[row], theirs(**INPUTS).logits[row], what="set_adapter")


@pytest.mark.parametrize("rank", [None, 5])
def test_a_weighted_sum_equals_pefts(tmp_path, rank):
    theirs, ours, plain = pefts(tmp_path, head=False)
    weights = {"one": 0.75, "two": -1.25, "three": 2.0}  # exact in float32, to which peft rounds them
    how = {"combination_type": "cat"} if rank is None else {"combination_type": "svd", "svd_rank": rank}
    theirs.add_weighted_adapter([*weights], [*weights.values()], "sum", **how)
    theirs.set_adapter("sum")
    summed = weighted_sum(ours, weights, rank)
    expected = {name.removeprefix("base_model.model."): module for name, module in theirs.named_modules()}
    for name, adapter in adapters(summed).items():
        assert_close(adapter.delta_weight(), expected[name].get_delta_weight("sum"), what=name)
        if rank is None:  # the factors of the SVD have arbitrary signs
            assert_close(adapter.lora_A, expected[name].lora_A["sum"].weight, what=f"A of {name}")
        assert_same(adapter.rank, expected[name].r["sum"] if rank else 3 + 6 + 2, f"rank of {name}")
    logits = theirs(**INPUTS).logits
    assert_close(summed.eval()(**INPUTS), logits, what="logits of the sum")
    save_adapter(summed, tmp_path / "sum")
    read = peft.PeftModel.from_pretrained(plain, tmp_path / "sum").double().eval()
    assert_close(read(**INPUTS).logits, logits, what="logits of peft with our file")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_sum_counts_from_where_an_initialisation_starts(tmp_path, init):
    model = inject_lora(our_copy(reference_model(), tmp_path), LoRAConfig(rank=3, alpha=8, init=init))
    randomized(model, 5)
    assert_close(weighted_sum({"a": model}, {"a": 1.0}).eval()(**INPUTS), model(**INPUTS), what="logits of one alone")
    half = adapters(weighted_sum({"a": model}, {"a": 0.5}))
    for name, adapter in adapters(model).items():
        update = adapter.merged()[0] - adapter.base.weight
        assert_close(half[name].delta_weight(), 0.5 * update, what=f"half of the update of {name}")


def test_a_sum_takes_what_it_does_not_sum_from_the_named_model(tmp_path):
    reference = reference_model()
    configs = {
        "a": LoRAConfig(rank=3, bias="lora_only", use_rslora=True, rank_pattern={"key": 2}, alpha_pattern={"key": 5}),
        "b": LoRAConfig(rank=4, alpha=6, target_modules=("query", "dense"), modules_to_save=()),
    }
    models = {name: our_copy(reference, tmp_path / name) for name in configs}
    for seed, (name, config) in enumerate(configs.items()):
        randomized(inject_lora(models[name], config), seed)
    parts, weights = {name: adapters(model) for name, model in models.items()}, {"a": 0.5, "b": -2.0}
    with pytest.raises(LoRAError, match=r"^b: roberta.*query.bias is trained to other values .* by rest_of"):
        weighted_sum(models, weights)
    with pytest.raises(LoRAError, match=r"target_modules: 'classifier.dense' matches no"):  # a trains it fully
        weighted_sum(models, weights, rest_of="a")
    del parts["b"]["classifier.dense"]
    models["b"].classifier.dense = models["b"].classifier.dense.base
    summed = weighted_sum(models, weights, rest_of="a")
    for name, adapter in adapters(summed).items():
        expected = sum(weights[own] * each[name].delta_weight() for own, each in parts.items() if name in each)
        assert_close(adapter.delta_weight(), expected, what=name)
    for name, parameter in own_parameters(models["a"], parts["a"]).items():
        assert_same(own_parameters(summed, adapters(summed))[name], parameter, name)


def test_what_is_no_sum_of_updates_is_refused(models):
    for chosen, weights, says in [
        (["a", "b.2"], {"a": 1}, "the weights are {'a': 1}; give a finite one for each of a, b.2"),
        (["a"], {"a": float("nan")}, "give a finite one"),
        (["a", "b.2"], {"a": 1, "b.2": 1}, "b.2: only the updates of plain LoRA can be summed"),
        (["a", "c"], {"a": 1, "c": 1}, "c: only the updates of plain LoRA can be summed"),
    ]:
        with pytest.raises(LoRAError, match=says):
            weighted_sum({name: models[name] for name in chosen}, weights)
    with pytest.raises(LoRAError, match="rest_of is 'b'; choose one of a"):
        weighted_sum({"a": models["a"]}, {"a": 1}, rest_of="b")
    with pytest.raises(LoRAError, match="rank is 0"):
        weighted_sum({"a": models["a"]}, {"a": 1}, rank=0)
