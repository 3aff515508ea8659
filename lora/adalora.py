"""AdaLoRA: an update in the form of a singular value decomposition; the least important singular values are pruned.

    y = x W^T + b + s * dropout(x) (E * A)^T B^T,     s = alpha / (init_r + 1e-5)

In the paper's letters the update is P Lambda Q: B = P (out, r), left singular vectors, E = Lambda (r, 1), singular
values, A = Q (r, in), right ones. E starts at zero, so training starts exactly at the pretrained model. Two calls in
`train_step` do the rest: `orthogonality_penalty` adds to the loss, `allocate_ranks` prunes after the step.
Source: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import Adapter


class AdaLoRALinear(Adapter):
    """An `nn.Linear` (`base`, frozen) with r = `rank` triplets, each a number of E, a row of A and a column of B."""

    method = "AdaLoRA"
    peft_keys = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}  # noqa: RUF012  a constant
    kept: Tensor
    sensitivity: Tensor
    uncertainty: Tensor

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, kept: Sequence[bool] = ()) -> None:
        super().__init__(base)
        self.scaling = alpha / (rank + 1e-5)  # after pruning too; 1e-5 as in peft
        self.dropout = nn.Dropout(dropout)
        self.lora_A = self.parameter_like(rank, base.in_features)
        self.lora_B = self.parameter_like(base.out_features, rank)
        self.lora_E = self.parameter_like(rank, 1)
        nn.init.normal_(self.lora_A, std=0.02), nn.init.normal_(self.lora_B, std=0.02), nn.init.zeros_(self.lora_E)
        # The state of `allocate_ranks`, in buffers, which checkpoints hold. `kept` has values on the meta device too.
        self.register_buffer("kept", torch.tensor(kept or [True] * rank, device="cpu"))
        for name in ("sensitivity", "uncertainty"):  # of each number in a triplet
            self.register_buffer(name, self.lora_A.new_zeros(rank, 1 + base.in_features + base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)  # x W^T + b
        if self.is_merged:
            return y
        x_A = F.linear(self.dropout(x), (self.lora_E * self.lora_A).to(x.dtype))  # (..., r)
        return y + F.linear(self.scaling * x_A, self.lora_B.to(x.dtype))

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W' = W + s B (E * A), (out, in); b' = b."""
        update = self.scaling * (self.lora_B @ (self.lora_E * self.lora_A))
        return self.base.weight + update.to(self.base.weight.dtype), self.base.bias

    def settings(self) -> dict[str, float]:
        """Rank before pruning, and scaling."""
        return {"rank": len(self.lora_E), "scaling": self.scaling}

    def in_file(self) -> dict[str, Tensor]:
        """The triplets that are not pruned."""
        rows = self.kept.nonzero().flatten().tolist()
        return {"lora_A": self.lora_A[rows], "lora_B": self.lora_B[:, rows], "lora_E": self.lora_E[rows]}

    def load(self, tensors: Mapping[str, Tensor], planned: Any) -> None:
        """Copy a file's triplets to where they were; the pruned ones become zero."""
        self.kept = planned.kept.to(self.lora_E.device)
        for name, parameter in self.own_parameters().items():
            own, stored = (parameter.T, tensors[name].T) if name == "lora_B" else (parameter, tensors[name])
            own.zero_()[self.kept] = stored.to(own)

    def update_importance(self, beta1: float, beta2: float) -> None:
        """I = |w g| of each number w with gradient g: its running mean, and that of its deviation (section 3.2)."""
        E, A, B = ((w * w.grad).abs() for w in (self.lora_E, self.lora_A, self.lora_B))  # type: ignore[operator]
        importance = torch.cat([E, A, B.T], dim=1)  # (r, 1 + in + out)
        self.sensitivity = beta1 * self.sensitivity + (1 - beta1) * importance
        self.uncertainty = beta2 * self.uncertainty + (1 - beta2) * (importance - self.sensitivity).abs()

    def scores(self) -> Tensor:
        """(r,): s(E) + mean s(A) + mean s(B) of each triplet, with s = sensitivity * uncertainty (section 3.2)."""
        s = self.sensitivity * self.uncertainty
        s_E, s_A, s_B = s.split([1, self.base.in_features, self.base.out_features], dim=1)
        return s_E[:, 0] + (s_A.mean(dim=1) + s_B.mean(dim=1))


def orthogonality_penalty(model: nn.Module, share: float = 1.0) -> Tensor | float:
    """share * orth_reg_weight * mean over all A and B of |A A^T - I|, |B^T B - I|, or 0 (section 3.1: squared)."""
    if not (layers := _layers(model)):
        return 0.0
    grams = torch.stack([gram for one in layers for gram in (one.lora_A @ one.lora_A.T, one.lora_B.T @ one.lora_B)])
    norms = (grams - torch.eye(grams.shape[-1]).to(grams)).norm(dim=(1, 2))
    return share * layers[0].config.orth_reg_weight * norms.mean()


@torch.no_grad()
def allocate_ranks(model: nn.Module, step: int) -> None:
    """After optimizer step `step`, from 0, with its gradients: set E to zero outside the most important triplets.

    The number of triplets in the model falls after step tinit and is final at step total_step - tfinal (section 3.3):
    target + (initial - target) (1 - (step - tinit) / (total_step - tfinal - tinit))^3. Pruned ones may grow until then.
    """
    if not (layers := _layers(model)):
        return
    config, final, pruned = layers[0].config, layers[0].config.final_step(), 0
    for layer in layers if step < final else ():
        layer.update_importance(config.beta1, config.beta2)
    if step <= final:
        scores = torch.stack([layer.scores() for layer in layers])  # (layers, r)
        if step == final or (step > config.tinit and step % config.deltaT == 0):
            target, left = config.target_r * len(layers), 1 - (step - config.tinit) / (final - config.tinit)
            pruned = scores.numel() - int((scores.numel() - target) * left**3 + target)
        threshold = scores.flatten().sort().values[pruned - 1] if pruned > 0 else -1
        for layer, score in zip(layers, scores, strict=True):
            layer.kept = score > threshold
    for layer in layers:
        layer.lora_E.masked_fill_(~layer.kept[:, None], 0.0)


def _layers(model: nn.Module) -> list[AdaLoRALinear]:
    return [module for module in model.modules() if isinstance(module, AdaLoRALinear)]
