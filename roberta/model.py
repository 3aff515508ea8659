"""RoBERTa: embeddings, attention, feed-forward, encoder, classification head.

The modules have the names of the published checkpoints (`roberta.encoder.layer.0.attention.self.query`, ...), so a
checkpoint's keys, a peft adapter's keys and LoRA targets are all paths of this module tree. Nothing here knows of LoRA:
`lora.inject` replaces linear layers from outside.

Shapes: `batch` sequences of `seq` tokens, each a vector of `hidden` numbers; `heads` attention heads of
`head = hidden / heads` each.
Sources: Vaswani et al. 2017 (attention), Devlin et al. 2018 (BERT), Liu et al. 2019 (RoBERTa).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roberta.config import RobertaConfig


class Embeddings(nn.Module):
    """Word + position + token-type embedding, LayerNorm, dropout.

        e_t = dropout(LayerNorm(word[id_t] + position[p + t'] + type[0])),   t' real tokens up to and including t

    Positions are counted over real tokens only and start at `p + 1`, p being the padding index: rows 0..p of the
    table belong to padding. Source: Devlin et al. 2018, section 3 and figure 2; the offset is RoBERTa's own.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        padding, hidden = config.pad_token_id, config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=padding)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden, padding_idx=padding)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.padding = padding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) ids and mask -> (batch, seq, hidden); longer by the virtual tokens that prompt tuning adds."""
        embedded = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        real = prepend_true(attention_mask, embedded.shape[1]).long()
        # Mask 1 1 1 0 gives rows 2 3 4 1 for p = 1: padding stays at row p.
        position_ids = real.cumsum(dim=1) * real + self.padding
        embedded = embedded + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embedded))


def prepend_true(mask: Tensor, length: int) -> Tensor:
    """A mask (..., seq) padded at the left to (..., length): tokens that a method puts before a text are never padding.

    The text starts with `<s>`, so it makes no difference whether they stand before or directly after it.
    """
    return F.pad(mask, (length - mask.shape[-1], 0), value=1)


def kernel_has_dropout(device: torch.device) -> bool:
    """Whether `scaled_dot_product_attention` has a fused kernel with dropout there, which a CPU lacks.

    The proofs replace this function to run either branch on a CPU.
    """
    return device.type != "cpu"


class SelfAttention(nn.Module):
    """Multi-head self-attention, before its output projection.

        context_h = dropout(softmax(Q_h K_h^T / sqrt(head) + M)) V_h        for each head h
        Q = x W_q^T + b_q,   K = x W_k^T + b_k,   V = x W_v^T + b_v

    M is 0 where the key is a real token and -inf where it is padding. Source: Vaswani et al. 2017, section 3.2.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states: Tensor, key_mask: Tensor, num_queries: int | None = None) -> Tensor:
        """(batch, seq, hidden) and a boolean (batch, 1, 1, seq) -> (batch, num_queries, hidden); see `Attention`."""
        query = self.split_heads(self.query(hidden_states[:, :num_queries]))
        key = self.split_heads(self.key(hidden_states))
        value = self.split_heads(self.value(hidden_states))
        key_mask = prepend_true(key_mask, key.shape[2])
        dropout = self.dropout.p if self.training else 0.0
        if dropout == 0 or kernel_has_dropout(query.device):
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=dropout)
        else:
            scores = query @ key.transpose(-1, -2)  # (batch, heads, num_queries, keys), modified in place below
            scores = scores.div_(math.sqrt(query.shape[-1])).masked_fill_(~key_mask, -math.inf)
            probabilities = torch.softmax(scores, dim=-1)
            context = self.dropout(probabilities) @ value
        return context.transpose(1, 2).flatten(2)

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, hidden) -> (batch, heads, tokens, head)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class AddAndNorm(nn.Module):
    """The end of each sublayer: y = LayerNorm(residual + dropout(x W^T + b)).

    LayerNorm after the sum ("post-LN"), as published; later models moved it in front of the matmuls.
    """

    def __init__(self, in_features: int, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(batch, seq, in) and (batch, seq, hidden) -> (batch, seq, hidden)."""
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    """Self-attention and its output projection: y = LayerNorm(x + dropout([context_1 | ... | context_H] W_o^T + b_o)).

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        # Called "self" because the checkpoints call it so: attention.self.query is the path of W_q.
        self.self = SelfAttention(config)
        self.output = AddAndNorm(config.hidden_size, config)

    def forward(self, hidden_states: Tensor, key_mask: Tensor, num_queries: int | None = None) -> Tensor:
        """(batch, seq, hidden) and a boolean (batch, 1, 1, seq), true at real tokens -> (batch, num_queries, hidden).

        Only the first `num_queries` tokens are updated (in the last layer one, see `Encoder`), all of them by default;
        each still attends to every real token.
        """
        context = self.self(hidden_states, key_mask, num_queries)
        return self.output(context, residual=hidden_states[:, :num_queries])


class Intermediate(nn.Module):
    """The wide half of the feed-forward network: y = GELU(x W^T + b), with the exact GELU, x Phi(x).

    Source: Hendrycks & Gimpel 2016, section 2; Vaswani et al. 2017, section 3.3.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, intermediate)."""
        return F.gelu(self.dense(hidden_states))


class Layer(nn.Module):
    """One encoder layer: attention, then the feed-forward network, each ending in `AddAndNorm`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = AddAndNorm(config.intermediate_size, config)

    def forward(self, hidden_states: Tensor, key_mask: Tensor, num_queries: int | None = None) -> Tensor:
        """(batch, seq, hidden) and a boolean (batch, 1, 1, seq) -> (batch, num_queries, hidden); see `Attention`."""
        attended = self.attention(hidden_states, key_mask, num_queries)
        return self.output(self.intermediate(attended), residual=attended)


class Encoder(nn.Module):
    """`num_hidden_layers` layers, one after the other.

    With `first_token_only`, the last layer updates `<s>` alone, the one vector that classification reads: keys and
    values still come from every token, so the result is the same, but the last layer's query, output and feed-forward
    matmuls, 10 of its 12 hidden^2 multiply-adds per token, shrink to one token per sequence.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, key_mask: Tensor, first_token_only: bool = False) -> Tensor:
        """(batch, seq, hidden) and a boolean (batch, 1, 1, seq) -> (batch, seq, hidden), or (batch, 1, hidden)."""
        *lower, last = self.layer
        for layer in lower:
            hidden_states = layer(hidden_states, key_mask)
        return last(hidden_states, key_mask, num_queries=1 if first_token_only else None)


class Roberta(nn.Module):
    """Token ids to one contextual vector per token."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, first_token_only: bool = False) -> Tensor:
        """(batch, seq) ids, (batch, seq) mask (1 or True at real tokens, 0 at padding) -> (batch, seq, hidden).

        With `first_token_only`, that of the first token alone, (batch, 1, hidden): the same numbers for less work. It
        is `<s>`, unless prompt tuning puts virtual tokens in front, which the result then contains too.
        """
        key_mask = attention_mask.bool()[:, None, None, :]  # the same for every head and every query
        return self.encoder(self.embeddings(input_ids, attention_mask), key_mask, first_token_only)


class ClassificationHead(nn.Module):
    """logits = dropout(tanh(dropout(h) W_1^T + b_1)) W_2^T + b_2, h being the vector of the first token, `<s>`.

    Source: Devlin et al. 2018, section 4.1 ([CLS] there); dense-tanh-projection as in the published RoBERTa code.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, sentence: Tensor) -> Tensor:
        """(batch, hidden) -> (batch, labels)."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(sentence)))))


class RobertaForSequenceClassification(nn.Module):
    """The encoder and the classification head.

    A model built directly has PyTorch's default initial values; `roberta.weights.load_checkpoint` loads a checkpoint's.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.config = config
        self.roberta = Roberta(config)
        self.classifier = ClassificationHead(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) ids and mask -> (batch, labels) logits, before the softmax."""
        return self.classifier(self.roberta(input_ids, attention_mask, first_token_only=True)[:, 0])
