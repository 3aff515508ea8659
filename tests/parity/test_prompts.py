"""Virtual tokens beyond test_methods.py: where they stand, how they start, what files hold, what is refused."""

import json

import peft
import pytest
import torch

from evaluate import Arguments, evaluate
from lora.adapter import adapters
from lora.config import PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from lora.errors import LoRAError
from lora.inject import count_parameters, drop_encoders, inject_lora
from lora.peft_format import CONFIG_NAME, load_adapter, save_adapter
from roberta.weights import load_checkpoint
from tests.parity.oracle import assert_close, assert_same, our_copy, ragged_batch, reference_model
from tests.parity.test_methods import our_keys, their_keys
from training.config import read_config
from training.distributed import ALONE
from training.errors import ConfigError
from training.setup import load_inputs

BATCH = ragged_batch([7, 2, 5])
LSTM = PTuningConfig(
    num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=3, encoder_dropout=0.5
)


def logits(model):
    return model.eval()(BATCH["input_ids"], BATCH["attention_mask"])


def test_after_the_first_token(tmp_path):
    """The head reads <s>, the tokens after it are virtual; peft refuses the file, which would be another function."""
    reference = reference_model()
    ours = inject_lora(
        our_copy(reference, tmp_path / "base"), PromptTuningConfig(num_virtual_tokens=3, after_first=True)
    )
    (adapter,) = adapters(ours).values()
    reference.double()
    embedded = reference.roberta.embeddings.word_embeddings(BATCH["input_ids"])
    prompt = adapter.prompt.expand(3, -1, -1)
    expected = reference(
        inputs_embeds=torch.cat((embedded[:, :1], prompt, embedded[:, 1:]), dim=1),
        attention_mask=torch.cat((torch.ones(3, 3), BATCH["attention_mask"]), dim=1),
    ).logits
    assert_close(logits(ours), expected, what="logits")
    save_adapter(ours, tmp_path / "adapter", task_type="SEQ_CLS")
    again = our_copy(reference, tmp_path / "again")
    load_adapter(again, tmp_path / "adapter")
    assert_same(logits(again), logits(ours), "logits of the file")
    with pytest.warns(UserWarning, match="after_first"), pytest.raises(KeyError, match="prompt_embeddings"):
        peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (PromptTuningConfig(), peft.PromptTuningConfig(num_virtual_tokens=20)),
        (
            PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"),
            peft.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"),
        ),
        (PTuningConfig(), peft.PromptEncoderConfig(num_virtual_tokens=20)),
        (
            LSTM,
            peft.PromptEncoderConfig(
                num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=3
            ),
        ),
    ],
    ids=["random", "words", "MLP", "LSTM"],
)
def test_initial_values_are_pefts(ours, theirs, tmp_path):
    reference = reference_model()
    model = our_copy(reference, tmp_path, torch.float32)
    theirs.task_type = "SEQ_CLS"
    torch.manual_seed(5)
    inject_lora(model, ours)
    torch.manual_seed(5)
    wanted = their_keys(peft.get_peft_model(reference, theirs))
    for key, parameter in our_keys(model).items():
        assert_same(parameter, wanted[key], key)


@pytest.mark.parametrize(
    "config", [LSTM, PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True)], ids=["P-tuning", "prefixes"]
)
def test_a_file_holds_what_the_network_computes_without_dropout(config, tmp_path):
    """Also of a model that is being trained; what its file says of the network costs nothing and changes nothing."""
    model = inject_lora(our_copy(reference_model(), tmp_path / "base"), config)
    expected = logits(model)
    model.train()
    save_adapter(model, tmp_path / "adapter")
    assert all(module.training for module in model.modules())
    path = tmp_path / "adapter" / CONFIG_NAME
    settings = json.loads(path.read_text())
    assert settings["inference_mode"] is True
    path.write_text(json.dumps(settings | {"encoder_hidden_size": 2**31 - 1, "inference_mode": False}))
    again = our_copy(reference_model(), tmp_path / "again")
    load_adapter(again, tmp_path / "adapter")
    assert_same(logits(again), expected, "logits of the file")
    drop_encoders(model)
    assert_same(logits(model), expected, "logits without the network")
    assert_same(count_parameters(model), count_parameters(again), "parameters")
    load_adapter(model, tmp_path / "adapter")
    assert_same(logits(model), expected, "logits of the file in the model that was trained")


def test_pefts_text_initialisation_is_read(tmp_path):
    model = inject_lora(our_copy(reference_model(), tmp_path / "base"), PromptTuningConfig())
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG_NAME
    assert "after_first" not in json.loads(path.read_text())  # peft would warn of it
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "is this", "tokenizer_name_or_path": "x"}
    path.write_text(json.dumps(json.loads(path.read_text()) | text))
    again = our_copy(reference_model(), tmp_path / "again")
    load_adapter(again, tmp_path / "adapter")
    assert_same(logits(again), logits(model), "logits")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PromptTuningConfig, {"num_virtual_tokens": 0}, "prompt_tuning: num_virtual_tokens is 0; it is an integer, 1"),
        (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, "prompt_tuning_init is 'TEXT'; choose RANDOM or SAMPLE"),
        (PromptTuningConfig, {"inference_mode": True}, "inference_mode is True, which is for files"),
        (PromptTuningConfig, {"modules_to_save": ("embeddings",)}, "holds roberta.embeddings.word_embeddings, which"),
        (PTuningConfig, {"encoder_reparameterization_type": "GRU"}, "p_tuning: encoder_reparameterization_type is"),
        (PTuningConfig, {"encoder_dropout": 1.0}, "encoder_dropout is 1.0; it is a probability"),
        (PTuningConfig, {"encoder_dropout": 0.1}, "encoder_dropout is 0.1, which an MLP does not have; use LSTM"),
        (PTuningConfig, {"encoder_num_layers": 3}, "encoder_num_layers is 3, which an MLP does not have; use LSTM"),
        (
            PTuningConfig,
            {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_dropout": 0.1},
            "encoder_dropout is 0.1, but there is one layer",
        ),
        (PrefixTuningConfig, {"encoder_hidden_size": 3}, "encoder_hidden_size is 3, but prefix_projection is off"),
        (PrefixTuningConfig, {"init_weights": "one"}, "prefix_tuning: init_weights is 'one'; choose zero"),
    ],
)
def test_settings_without_sense_are_refused(kind, settings, message, tmp_path):
    model = our_copy(reference_model(), tmp_path)
    with pytest.raises(LoRAError, match=message):
        inject_lora(model, kind(**settings))
    assert not adapters(model)


def test_a_model_without_the_modules_is_refused():
    with pytest.raises(LoRAError, match="prefix_tuning: the model has no module called value"):
        inject_lora(torch.nn.ModuleDict({"key": torch.nn.Linear(2, 2)}), PrefixTuningConfig(modules_to_save=()))


@pytest.mark.parametrize("table", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_take_positions(table, tiny_config, tiny_checkpoint, tmp_path, capsys):
    """A run is refused if text and virtual tokens don't fit into the 32 positions; evaluation truncates the text."""
    text = tiny_config.read_text().replace("[lora]\nrank = 4\nalpha = 8", f"[{table}]\nnum_virtual_tokens = 16")
    tiny_config.write_text(text)
    config = read_config(tiny_config)
    load_inputs(config, ALONE)
    model = inject_lora(load_checkpoint(tiny_checkpoint, new_head=True), *config.methods)
    save_adapter(model, tmp_path / "adapter", base_model=str(tiny_checkpoint), also=("classifier",))
    assert evaluate(Arguments(run=tmp_path / "adapter", text=("goal " * 40,))) == 0
    assert "longer than 16 tokens" in capsys.readouterr().out
    tiny_config.write_text(text.replace("virtual_tokens = 16", "virtual_tokens = 17"))
    with pytest.raises(ConfigError, match="max_length is 16, with 17 virtual tokens, but .* 32 tokens"):
        load_inputs(read_config(tiny_config), ALONE)
