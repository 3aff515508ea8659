"""AdaLoRA: an update in the form of a singular value decomposition; the least important singular values are pruned.

    y = x W^T + b + s * dropout(x) (P Lambda Q)^T,     s = alpha / (init_r + 1e-5)

P (out, r), left singular vectors, is `lora_B`, named as in peft; Lambda, a diagonal of singular values, is `lora_E`
(r, 1); Q (r, in), right singular vectors, is `lora_A`. Lambda starts at zero, so training starts exactly at the
pretrained model. `train_step` adds `orthogonality_penalty` to the loss and prunes by `allocate_ranks` after the step.
Source: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import Adapter


class AdaLoRALinear(Adapter):
    """An `nn.Linear` (`base`, frozen) with r = `rank` triplets: a column of P, a number of Lambda and a row of Q."""

    method = "AdaLoRA"
    peft_keys = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}  # noqa: RUF012  a constant

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, kept: Sequence[bool] = ()) -> None:
        super().__init__(base)
        self.scaling, self.dropout = alpha / (rank + 1e-5), nn.Dropout(dropout)  # after pruning too; 1e-5 as in peft
        self.lora_A = self.parameter_like(rank, base.in_features)
        self.lora_B = self.parameter_like(base.out_features, rank)
        self.lora_E = self.parameter_like(rank, 1)
        nn.init.normal_(self.lora_A, std=0.02), nn.init.normal_(self.lora_B, std=0.02), nn.init.zeros_(self.lora_E)
        # The state of `allocate_ranks`, which checkpoints hold. `kept` has values on the meta device too.
        self.kept: Tensor = nn.Buffer(torch.tensor(kept or [True] * rank, device="cpu"))  # (r,), false if pruned
        size = rank, 1 + base.in_features + base.out_features  # the numbers of a triplet: in Lambda, in Q, in P
        self.sensitivity: Tensor = nn.Buffer(self.lora_A.new_zeros(size))  # I
        self.uncertainty: Tensor = nn.Buffer(self.lora_A.new_zeros(size))  # U

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)  # x W^T + b
        if self.is_merged:
            return y
        x_Q = F.linear(self.dropout(x), (self.lora_E * self.lora_A).to(x.dtype))  # dropout(x) (Lambda Q)^T, (..., r)
        return y + F.linear(self.scaling * x_Q, self.lora_B.to(x.dtype))

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W' = W + s P Lambda Q, (out, in); b' = b."""
        update = self.scaling * (self.lora_B @ (self.lora_E * self.lora_A))
        return self.base.weight + update.to(self.base.weight.dtype), self.base.bias

    def settings(self) -> dict[str, float]:
        """Rank before pruning, and scaling."""
        return {"rank": len(self.lora_E), "scaling": self.scaling}

    def in_file(self) -> dict[str, Tensor]:
        """The triplets that are not pruned."""
        rows = self.kept.nonzero().flatten().tolist()
        return {"lora_A": self.lora_A[rows], "lora_B": self.lora_B[:, rows], "lora_E": self.lora_E[rows]}

    def load(self, tensors: Mapping[str, Tensor], planned: Adapter) -> None:
        """Copy a file's triplets to where they were; the pruned ones become zero."""
        self.kept = planned.get_buffer("kept").to(self.lora_E.device)
        for name, parameter in self.own_parameters().items():
            own, stored = (parameter.T, tensors[name].T) if name == "lora_B" else (parameter, tensors[name])
            own.zero_()[self.kept] = stored.to(own)

    def update_importance(self, beta1: float, beta2: float) -> None:
        """I <- beta1 I + (1 - beta1) i and U <- beta2 U + (1 - beta2) |i - I|, with i = |w dL/dw| (section 3.2)."""
        i_Lambda, i_Q, i_P = ((w * w.grad).abs() for w in (self.lora_E, self.lora_A, self.lora_B))  # type: ignore[operator]
        i = torch.cat([i_Lambda, i_Q, i_P.T], dim=1)  # (r, 1 + in + out)
        self.sensitivity = beta1 * self.sensitivity + (1 - beta1) * i
        self.uncertainty = beta2 * self.uncertainty + (1 - beta2) * (i - self.sensitivity).abs()

    def scores(self) -> Tensor:
        """S (r,), of each triplet: s(Lambda) + mean s(Q) + mean s(P), where s = I U (section 3.2)."""
        s = self.sensitivity * self.uncertainty  # (r, 1 + in + out)
        s_Lambda, s_Q, s_P = s.split([1, self.base.in_features, self.base.out_features], dim=1)
        return s_Lambda[:, 0] + (s_Q.mean(dim=1) + s_P.mean(dim=1))


def orthogonality_penalty(model: nn.Module, share: float = 1.0) -> Tensor | float:
    """share * orth_reg_weight * mean over all Q and P of |Q Q^T - Id|, |P^T P - Id|, or 0 (section 3.1: squared)."""
    if not (layers := _layers(model)):
        return 0.0
    grams = torch.stack([gram for one in layers for gram in (one.lora_A @ one.lora_A.T, one.lora_B.T @ one.lora_B)])
    norms = (grams - torch.eye(grams.shape[-1]).to(grams)).norm(dim=(1, 2))  # (2 layers, r, r) -> (2 layers,)
    return share * layers[0].config.orth_reg_weight * norms.mean()


@torch.no_grad()
def allocate_ranks(model: nn.Module, step: int) -> None:
    """After optimizer step `step`, from 0, with its gradients: set Lambda to zero outside the model's best b triplets.

        b = b_last + (b_first - b_last) (1 - (step - tinit) / (final - tinit))^3,     final = total_step - tfinal

    At every `deltaT`-th step after `tinit`, so that pruned triplets can grow again; at `final` for good (section 3.3).
    """
    if not (layers := _layers(model)):
        return
    config, final = layers[0].config, layers[0].config.final_step()
    for layer in layers if step < final else ():
        layer.update_importance(config.beta1, config.beta2)
    if step <= final:
        S = torch.stack([layer.scores() for layer in layers])  # (layers, r)
        b = b_first = S.numel()
        if step == final or (step > config.tinit and step % config.deltaT == 0):
            b_last = config.target_r * len(layers)
            b = int(b_last + (b_first - b_last) * (1 - (step - config.tinit) / (final - config.tinit)) ** 3)
        threshold = S.flatten().sort().values[b_first - b - 1] if b < b_first else -1  # the best of those to prune
        for layer, scores in zip(layers, S, strict=True):
            layer.kept = scores > threshold  # (r,)
    for layer in layers:
        layer.lora_E.masked_fill_(~layer.kept[:, None], 0.0)


def _layers(model: nn.Module) -> list[AdaLoRALinear]:
    return [module for module in model.modules() if isinstance(module, AdaLoRALinear)]
