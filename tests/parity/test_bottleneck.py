"""Bottleneck adapters against AdapterHub's library, by the numbers that adapterhub.py computed in its environment.

Logits, gradients, counts, twenty optimizer steps, and the files: what the library wrote is read here, and ours have the
form that it was seen to read.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.adapter import adapters
from lora.bottleneck import BottleneckAdapter
from lora.budget import count_on_meta
from lora.config import BottleneckConfig, LoRAConfig
from lora.errors import LoRAError
from lora.inject import count_parameters, inject_lora, merge_lora
from lora.peft_format import load_adapter, read_base_model, save_adapter
from roberta.config import RobertaConfig
from roberta.model import AddAndNorm
from tests.parity.adapterhub import CASES, PATH, logits_of, our_base, our_model, step, twenty_steps, without_head
from tests.parity.oracle import assert_close, assert_same, our_copy, reference_model

FOUND = json.loads(PATH.read_text())["cases"]
HEAD = {"classifier.dense": "heads.topics.1", "classifier.out_proj": "heads.topics.4"}


def named(model):
    """The trained parameters by their names without AdapterHub's "adapters.NAME"."""
    names = {id(value): name.replace(".base.", ".") for name, value in model.named_parameters() if value.requires_grad}
    for name, adapter in adapters(model).items():
        names |= {id(value): f"{name}.{adapter.peft_keys[own]}" for own, value in adapter.own_parameters().items()}
    return {names[id(value)]: value for value in model.parameters() if value.requires_grad}


def expect(tensor, case, field, tolerance=1e-10):
    """Compare a tensor with the library's numbers."""
    numbers = FOUND[case][field] if isinstance(field, str) else FOUND[case]["gradients"][field[0]]
    assert_close(tensor, torch.tensor(numbers, dtype=torch.float64).view_as(tensor), tolerance, str(field))


def their_folder(folder, case, kind="static"):
    """The folder that the library wrote for a case."""
    folder.mkdir()
    values = named(our_model(case))
    for name, content in FOUND[case][kind].items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content))
            continue
        tensors = {}
        for key in content:
            ours = key.replace(".adapters.topics.", ".")
            for here, there in HEAD.items():
                ours = ours.replace(f"{there}.", f"{here}.")
            tensors[key] = values[ours].detach().contiguous()
        save_file(tensors, folder / name)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_numbers(case):
    found, model = FOUND[case], our_model(case)
    assert_same(count_parameters(model).trainable, found["trained"], "trained parameters")
    logits = step(model, logits_of)
    expect(logits, case, "logits")
    trained = named(model)
    assert_same(sorted(trained), sorted(found["gradients"]), "names")
    for name, parameter in trained.items():
        expect(parameter.grad, case, [name])
    expect(twenty_steps(model, logits_of), case, "logits after 20 steps", 1e-8)


@pytest.mark.parametrize("kind", ["static", "flexible"])
@pytest.mark.parametrize("case", CASES)
def test_files_of_the_library_are_read(case, kind, tmp_path):
    folder = their_folder(tmp_path / "theirs", case, kind)
    model = without_head(our_base())
    (config,) = load_adapter(model, folder)
    assert config == BottleneckConfig(**CASES[case], modules_to_save=("classifier.dense", "classifier.out_proj"))
    expect(logits_of(model), case, "logits")
    assert read_base_model(folder) is None


@pytest.mark.parametrize("case", CASES)
def test_files_have_the_form_of_the_librarys(case, tmp_path):
    save_adapter(our_model(case), tmp_path, base_model="roberta-base")
    theirs = FOUND[case]["static"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)
    for name, content in theirs.items():
        if name.endswith(".safetensors"):
            keys = [key.replace(".adapters.loraberta.", ".adapters.topics.") for key in load_file(tmp_path / name)]
            assert_same(sorted(keys), content, name)
        else:
            ours = json.loads((tmp_path / name).read_text())
            changed = {key for key in ours if ours[key] != content[key]}
            assert changed <= {"config", "model_name", "name", "label2id"}
            # The fields that we do not write have no effect, or else their defaults are in the library.
            assert_same({**(content["config"] or {}), **(ours["config"] or {})} or None, content["config"], name)
    assert read_base_model(tmp_path) == "roberta-base"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("adapter", {"non_linearity": "gelu"}, 'non_linearity = "gelu" is not supported, only "relu"'),
        ("adapter", {"residual_before_ln": "post_add"}, "residual_before_ln"),
        ("adapter", {"ln_after": True}, "ln_after = true"),
        ("adapter", {"scaling": "learned"}, "scaling"),
        ("adapter", {"dropout": 0.1}, "dropout"),
        ("adapter", {"inv_adapter": "nice"}, "inv_adapter"),
        ("adapter", {"architecture": "lora"}, 'architecture = "lora"'),
        ("adapter", {"invented": 1}, "invented = 1 is not supported;"),
        ("adapter", {"output_adapter": None}, "output_adapter"),
        ("adapter", {"reduction_factor": {"0": 2, "default": 4}}, "reduction_factor is .* must be a number"),
        ("adapter", {"reduction_factor": None}, "reduction_factor is missing"),
        ("adapter", {"reduction_factor": 0.5}, "reduction_factor is 0.5; it must be 1 or more"),
        ("adapter", {"reduction_factor": 2}, "wrong shape in .*adapter_down"),
        ("adapter", {"leave_out": 1}, "leave_out is 1; it must be a list"),
        ("adapter", {"leave_out": [0]}, "holds unexpected .*layer.0.output.adapter_down"),
        ("head", {"layers": 1}, "layers = 1 is not supported, only 2"),
        ("head", {"use_pooler": True}, "use_pooler"),
        ("head", {"head_type": "tagging"}, "not a head for classification"),
    ],
)
def test_what_is_computed_otherwise_is_refused(file, changes, message, tmp_path):
    folder = their_folder(tmp_path / "theirs", "pfeiffer", "flexible")
    path = folder / f"{file}_config.json"
    raw = json.loads(path.read_text())
    raw["config"] |= changes
    path.write_text(json.dumps(raw))
    model = our_base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LoRAError, match=message) as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_old_files_lack_fields_and_new_ones_have_more(tmp_path):
    folder = their_folder(tmp_path / "theirs", "houlsby")
    raw = json.loads((folder / "adapter_config.json").read_text())
    needed = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
    raw["config"] = {name: raw["config"][name] for name in needed} | {"invented": False}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    load_adapter(model := our_base(), folder)
    expect(logits_of(model), "houlsby", "logits")
    for name in needed:
        lacking = {key: value for key, value in raw["config"].items() if key != name}
        (folder / "adapter_config.json").write_text(json.dumps(raw | {"config": lacking}))
        with pytest.raises(LoRAError, match="adapter_config.json: "):
            load_adapter(our_base(), folder)


def test_initial_values_are_the_librarys():
    base = AddAndNorm(4, RobertaConfig(hidden_size=96))
    adapter = BottleneckAdapter(base, width=96, pfeiffer=True)
    for weight, bias in ((adapter.W_down, adapter.b_down), (adapter.W_up, adapter.b_up)):
        assert 0.0195 < weight.std() < 0.0205 and abs(weight.mean()) < 0.001 and not bias.any()


@pytest.mark.parametrize("name", ["adapter.safetensors", "model_head.safetensors"])
def test_pickles_are_refused(name, tmp_path):
    folder = their_folder(tmp_path / "theirs", "pfeiffer")
    pickled = {"adapter.safetensors": "pytorch_adapter.bin", "model_head.safetensors": "pytorch_model_head.bin"}[name]
    (folder / name).rename(folder / pickled)
    with pytest.raises(LoRAError, match=f"{pickled}: a pickle can run code.*use_safetensors=True"):
        load_adapter(our_base(), folder)


def test_beside_lora_inside_the_same_sublayer(tmp_path):
    configs = LoRAConfig(rank=2, target_modules=("query", "output.dense")), BottleneckConfig(form="houlsby")
    model = inject_lora(our_base(), *configs)
    with torch.no_grad():
        for value in named(model).values():
            value.add_(torch.linspace(-0.3, 0.2, value.numel()).view_as(value))
    assert_same(
        count_parameters(model).trainable,
        count_on_meta(our_base, *configs).trainable,
        "trained parameters of both",
    )
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bottleneck", "lora"]
    load_adapter(again := our_base(), tmp_path)
    assert_close(logits_of(again), logits_of(model), what="logits of the files")
    with pytest.raises(LoRAError, match="bottleneck can't be merged into the weights"):
        merge_lora(model)


def test_dropout_stands_where_the_plain_model_has_it():
    model = our_base().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    adapted = inject_lora(copy.deepcopy(model), BottleneckConfig(form="houlsby"))
    for adapter in adapters(adapted).values():
        torch.nn.init.zeros_(adapter.W_up)  # no update
    logits = []
    for each in (model, adapted):
        torch.manual_seed(1)
        logits.append(logits_of(each))
    assert_close(*logits, 1e-14)  # other masks would change the first digit; some CPUs sum in another order


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "mam"}, "bottleneck: form is 'mam'"),
        ({"reduction_factor": 0.9}, "bottleneck: reduction_factor is 0.9"),
        ({"reduction_factor": float("nan")}, "bottleneck: reduction_factor is nan"),
        ({"leave_out": (0, 2)}, "bottleneck: leave_out: the model has no layer 2"),
        ({"leave_out": (0, 1)}, "bottleneck: no sublayer is adapted"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(LoRAError, match=message):
        inject_lora(our_base(), BottleneckConfig(**fields))


def test_a_sublayer_in_a_fully_trained_module_gets_no_bottleneck(tmp_path):
    model = our_copy(reference_model(), tmp_path)
    inject_lora(model, BottleneckConfig(modules_to_save=("layer.1", "classifier")))
    assert [*adapters(model)] == ["roberta.encoder.layer.0.output"]
