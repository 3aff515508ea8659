"""P-tuning: prompt tuning whose vectors are computed by a small network, as independent ones are hard to train.

    P = MLP(T)                                          P, T (p, hidden); T is trained, as the network is
    P = MLP([forward LSTM(T) | backward LSTM(T)])       [.|.] (p, 2 width): each virtual token depends on the others

MLP is Linear, ReLU, Linear, ReLU, Linear, of sizes hidden, width, width, hidden; after an LSTM it is Linear, ReLU,
Linear, of sizes 2 width, 2 width, hidden. Once trained, P is all that is needed: a file holds nothing else, and a
loaded adapter computes what prompt tuning computes.
Source: Liu et al. 2021, "GPT Understands, Too", section 3.2; the MLP alone is peft's.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from lora.adapter import Adapter
from lora.prompt_tuning import PromptTuning


class PTuning(PromptTuning):
    """`PromptTuning` whose `prompt` goes through `lstm` and `mlp`, as far as there are any.

    An encoder "MLP" or "LSTM" has matrices of width `width`; None has none. `dropout` acts between the LSTM's layers.
    """

    method = "P-tuning"

    def __init__(
        self,
        base: nn.Embedding,
        num_virtual_tokens: int,
        after_first: bool,
        encoder: str | None,
        width: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__(base, num_virtual_tokens, after_first)
        hidden = base.embedding_dim
        self.lstm: nn.LSTM | None = None
        self.mlp: nn.Sequential | None = None
        sizes = [hidden, width, width, hidden]
        if encoder == "LSTM":
            lstm = nn.LSTM(hidden, width, num_layers, dropout=dropout, bidirectional=True)
            self.lstm = lstm.to(self.prompt)
            sizes = [2 * width, 2 * width, hidden]
        if encoder:
            layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
            self.mlp = nn.Sequential(*layers[:-1]).to(self.prompt)

    def virtual_tokens(self) -> Tensor:
        """P, (p, hidden)."""
        tokens: Tensor = self.prompt  # T, (p, hidden)
        if self.lstm is not None:
            with torch.backends.cudnn.flags(enabled=False):  # its dropout has a state that no checkpoint holds
                tokens = self.lstm(tokens)[0]  # (p, 2 width)
        return tokens if self.mlp is None else self.mlp(tokens)

    def in_file(self) -> dict[str, Tensor]:
        """P (p, hidden), computed without dropout."""
        training = self.training
        self.eval()
        prompt = self.virtual_tokens()
        self.train(training)
        return {"prompt": prompt}

    @torch.no_grad()
    def drop_encoder(self) -> None:
        """Replace T by P."""
        self.prompt.copy_(self.in_file()["prompt"])
        self.lstm = self.mlp = None

    def load(self, tensors: Mapping[str, Tensor], planned: Adapter) -> None:
        """Copy a file's P."""
        self.drop_encoder()
        self.prompt.copy_(tensors["prompt"])
