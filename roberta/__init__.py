"""RoBERTa for sequence classification: configuration, model, checkpoints, tokenizer. Knows nothing of LoRA."""

from roberta.config import RobertaConfig
from roberta.files import CheckpointError
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from roberta.weights import load_checkpoint, save_checkpoint

__all__ = [
    "CheckpointError",
    "RobertaConfig",
    "RobertaForSequenceClassification",
    "TextTokenizer",
    "load_checkpoint",
    "save_checkpoint",
]
