"""RoBERTa's masked language model: for each token, which entry of the vocabulary stands there.

    logits = LayerNorm(GELU(h W^T + b)) E^T + c

h is the encoder's vector of a token, E the table of word embeddings ("tied": it has no copy of its own), c one bias per
entry. Source: Devlin et al. 2018, section 3.1 (task 1); Liu et al. 2019, whose published code has this head.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roberta.config import RobertaConfig
from roberta.files import CheckpointError, non_float_tensors, open_weights, weights_path
from roberta.model import Roberta
from roberta.weights import load_checkpoint


class LMHead(nn.Module):
    """x = LayerNorm(GELU(h W^T + b)), then logits = x E^T + c for the table E of word embeddings."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor, embeddings: Tensor) -> Tensor:
        """(..., hidden) and (vocab, hidden) -> (..., vocab)."""
        return F.linear(self.layer_norm(F.gelu(self.dense(hidden_states))), embeddings, self.bias)


class MaskedLM(nn.Module):
    """The encoder and the head of masked language modelling, with the parameter names of the published checkpoints."""

    def __init__(self, roberta: Roberta, config: RobertaConfig) -> None:
        super().__init__()
        self.roberta = roberta
        self.lm_head = LMHead(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """(batch, seq) ids and mask -> (batch, seq, vocab) logits; (n, vocab) of n tokens, with a mask of `positions`.

        The vocabulary is large: logits of the tokens of interest alone take a hundredth of the work and memory.
        """
        hidden_states = self.roberta(input_ids, attention_mask)
        if positions is not None:
            hidden_states = hidden_states[positions]  # (n, hidden)
        return self.lm_head(hidden_states, self.roberta.embeddings.word_embeddings.weight)


def load_masked_lm(directory: str | Path) -> MaskedLM:
    """The masked language model of a checkpoint folder, in float32 on the CPU, in eval mode.

    No random number is drawn. Raises CheckpointError as `load_checkpoint`, and if the folder's `lm_head` is missing,
    incomplete, of another shape, or not tied to the embeddings.
    """
    config = RobertaConfig.from_file(Path(directory) / "config.json")
    with torch.random.fork_rng(devices=[]):  # `load_checkpoint` draws a classification head, which is not used
        model = MaskedLM(load_checkpoint(directory, config, new_head=True).roberta, config)
    wanted = dict(model.lm_head.named_parameters())
    path, table = weights_path(directory), model.roberta.embeddings.word_embeddings.weight
    with open_weights(directory) as weights, torch.no_grad():
        unusable = non_float_tensors(weights)
        keys = [key for key in weights if "lm_head." in key and key not in unusable]
        found = {key.rpartition("lm_head.")[2]: weights[key].get_tensor(key).float() for key in keys}
        for name, parameter in wanted.items():
            if name not in found or found[name].shape != parameter.shape or not found[name].isfinite().all():
                raise CheckpointError(f"{path}: has no usable lm_head.{name}; it is not a masked language model")
            parameter.copy_(found[name])
        if not torch.equal(found.get("decoder.weight", table), table):
            raise CheckpointError(f"{path}: lm_head.decoder.weight is not the table of word embeddings; not supported")
    return model.eval()
