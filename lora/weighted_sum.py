"""A weighted sum of LoRA adapters, as one LoRA adapter.

    s B A = w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ...

Both ways are those of peft's `add_weighted_adapter`: "cat" and "svd". Its "linear" adds the A's and the B's apart, so
that the product has terms such as B_1 A_2: it is not a sum of updates, and is left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import adapters
from lora.config import LoRAConfig
from lora.errors import LoRAError
from lora.inject import inject_lora, own_parameters, unload_lora
from lora.linear import LoRALinear
from lora.several import share_base


@torch.no_grad()
def weighted_sum(
    models: Mapping[str, nn.Module], weights: Mapping[str, float], rank: int | None = None, rest_of: str | None = None
) -> nn.Module:
    """A model whose LoRA update is the sum of those of `models`, weighted; `save_adapter` writes it as peft reads it.

    Exact, of the rank r_1 + r_2 + ..., unless a `rank` is given; then the nearest of that rank (see `sum_of_updates`).
    `models` have one base, of which the result shares the frozen parameters. What they train beside A and B, such as a
    head, is not summed: it must be the same in all of them, or `rest_of` names the model that it is taken from.

    Raises LoRAError if the weights are not those of `models`, if an adapter is not plain LoRA, or if the rest differs.
    """
    if weights.keys() != models.keys() or not models or not all(map(math.isfinite, weights.values())):
        raise LoRAError(f"the weights are {dict(weights)}; give a finite one for each of {', '.join(models)}")
    if rest_of not in (None, *models):
        raise LoRAError(f"rest_of is {rest_of!r}; choose one of {', '.join(models)}")
    first = models[next(iter(models)) if rest_of is None else rest_of]
    rest = own_parameters(first, adapters(first))
    for name, model in models.items():
        configs = getattr(model, "adapter_configs", ())
        if [type(config) for config in configs] != [LoRAConfig] or any(config.use_dora for config in configs):
            raise LoRAError(f"{name}: only the updates of plain LoRA can be summed; leave it out")
        share_base(model, first, name)
        for key, parameter in own_parameters(model, adapters(model)).items() if rest_of is None else ():
            if parameter.shape != rest[key].shape or not torch.equal(parameter, rest[key]):
                raise LoRAError(f"{name}: {key} is trained to other values than in the others; choose one by rest_of")

    found: dict[str, dict[str, Any]] = {name: adapters(model) for name, model in models.items()}
    layers = dict.fromkeys(layer for each in found.values() for layer in each)
    sums = {
        layer: sum_of_updates([(weights[name], each[layer]) for name, each in found.items() if layer in each], rank)
        for layer in layers
    }
    size = rank or max(len(A) for A, _ in sums.values())
    settings: Any = first.adapter_configs
    others = {name: getattr(settings[0], name) for name in ("dropout", "bias", "modules_to_save")}
    config = LoRAConfig(rank=size, alpha=float(size), target_modules=tuple(layers), **others)  # a scaling of 1
    summed = copy.deepcopy(first, {id(parameter): parameter for parameter in first.parameters()})
    inject_lora(unload_lora(summed), config)
    made: dict[str, Any] = dict(adapters(summed))
    for layer, (A, B) in sums.items():
        made[layer].lora_A.zero_()[: len(A)] = A  # a layer that not all of them adapt needs a lower rank
        made[layer].lora_B[:, : len(A)] = B
    share_base(summed, first)  # as neither can be merged now
    return summed


def sum_of_updates(parts: Sequence[tuple[float, LoRALinear]], rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with B A = D = w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ..., from (w_i, adapter i).

        A = [w_1 s_1 A_1; w_2 s_2 A_2; ...],  B = [B_1 | B_2 | ...]          r = r_1 + r_2 + ...
        A = V_r^T,  B = U_r S_r,  where D = U S V^T                          r = `rank`, at most

    Of all matrices of rank r, U_r S_r V_r^T is the nearest to D. Source: Eckart & Young 1936.
    """
    # As in a file, so that an initialisation that starts at B0 A0 (PiSSA, OLoRA) counts from there.
    held = [(weight * adapter.scaling, adapter.in_file()) for weight, adapter in parts]
    A = torch.cat([factor * tensors["lora_A"] for factor, tensors in held])
    B = torch.cat([tensors["lora_B"] for _, tensors in held], dim=1)
    if rank is None:
        return A, B
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]
