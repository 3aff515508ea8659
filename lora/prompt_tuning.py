"""Prompt tuning: trained vectors stand among the embeddings of a text, as if they were words of it.

    e = [P; E(ids)]                          P (p, hidden), E the frozen table of word embeddings
    e = [E(<s>); P; E(the other ids)]        with `after_first`

Nothing else changes: positions are counted over virtual and real tokens alike, so the text's own start later, and every
token attends to the virtual ones. The head reads the first token: as in peft that is the first virtual one, with
`after_first` it is <s>, as without prompts.
Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora.adapter import Adapter


class PromptTuning(Adapter):
    """An `nn.Embedding` of words (`base`, frozen) that puts p = `num_virtual_tokens` trained vectors into each text.

    They start as standard normal numbers, or as the vectors of random words with `sample_vocab`.
    """

    method = "Prompt tuning"
    peft_keys = {"prompt": "prompt_embeddings"}  # noqa: RUF012  a constant

    def __init__(
        self, base: nn.Embedding, num_virtual_tokens: int, after_first: bool, sample_vocab: bool = False
    ) -> None:
        super().__init__(base)
        self.after_first = after_first
        self.prompt = self.parameter_like(num_virtual_tokens, base.embedding_dim)
        nn.init.normal_(self.prompt)
        if sample_vocab:
            words = torch.randint(base.num_embeddings, (num_virtual_tokens,))
            self.prompt.data.copy_(base.weight[words])

    def virtual_tokens(self) -> Tensor:
        """P, (p, hidden)."""
        return self.prompt

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, seq) -> (batch, p + seq, hidden)."""
        embedded = self.base(ids)
        prompt = self.virtual_tokens().to(embedded.dtype).expand(len(ids), -1, -1)
        before = 1 if self.after_first else 0
        return torch.cat((embedded[:, :before], prompt, embedded[:, before:]), dim=1)

    def settings(self) -> dict[str, float]:
        """The number of virtual tokens, and their place."""
        return {"num_virtual_tokens": len(self.prompt), "after_first": self.after_first}
