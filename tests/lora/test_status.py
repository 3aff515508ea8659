"""The table of what is adapted, trained and merged."""

from lora.config import IA3Config, LoRAConfig
from lora.inject import inject_lora, merge_lora
from lora.status import model_status
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification


def test_status_names_each_adapted_or_trained_module():
    sizes = {"vocab_size": 24, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=20))
    lora = LoRAConfig(rank=2, alpha=3, target_modules=("query",), bias="lora_only", modules_to_save=())
    inject_lora(model, lora, IA3Config(target_modules=("key",), feedforward_modules=("none",)))
    merge_lora(model)
    attention, head = "roberta.encoder.layer.0.attention.self", model.config.num_labels
    assert [tuple(vars(row).values()) for row in model_status(model).modules] == [
        (f"{attention}.query", "LoRA rank=2, scaling=1.5", True, 2 * 2 * 12),
        (f"{attention}.query", "bias", None, 12),
        (f"{attention}.key", "IA3 feedforward=0", True, 12),
        ("classifier.dense", "weight, bias", None, 12 * 13),
        ("classifier.out_proj", "weight, bias", None, head * 13),
    ]
    lines = model_status(model).table().splitlines()
    assert lines[1].split()[-2:] == ["yes", "48"] and len({len(line) for line in lines}) == 1
