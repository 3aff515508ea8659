"""Several adapters over one base: in memory once, in one batch together.

    y_i = f_a(x_i)      row i of a batch goes through the version f_a of a module that its adapter a has

The frozen base is inside each f_a, and is the same tensors in all of them. What no adapter changes (most of the model)
computes all rows of the batch at once; a module that one does is called once per adapter, on its rows. So every row
passes the base once, and the result is that of each adapter alone, whatever its method.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import adapters
from lora.errors import LoRAError
from lora.inject import own_parameters, trained_parameters


class Versions(nn.Module):
    """A module in the version of each adapter; `rows` holds the rows of the batch that each of them computes."""

    def __init__(self, versions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.versions = nn.ModuleList(versions)
        self.rows: list[Tensor] = []

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """(batch, ...) -> (batch, ...), each row by its own version.

        Logits of fewer classes than others are padded with -inf, which is a probability of 0.
        """
        parts = [
            version(*(_of(rows, x) for x in inputs), **{name: _of(rows, x) for name, x in named.items()})
            for version, rows in zip(self.versions, self.rows, strict=True)
            if len(rows)
        ]
        if len({part.shape[1:-1] for part in parts}) > 1:
            raise LoRAError("adapters that make sequences longer can't share a batch with others; use them alone")
        width = max(part.shape[-1] for part in parts)
        padded = [F.pad(part, (0, width - part.shape[-1]), value=-math.inf) for part in parts]
        return torch.cat(padded)[torch.cat(self.rows).argsort()]


def _of(rows: Tensor, x: Any) -> Any:
    return x[rows] if isinstance(x, Tensor) else x


class Several(nn.Module):
    """Models that are one base with different adapters, as one model whose batches mix them.

    `models` maps a name to a model with an adapter, of any method, with a head of any size. Their frozen parameters
    become the same objects (see `share_base`, which raises LoRAError if they are of different bases).
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(models)
        first = next(iter(models.values()))
        for (_, base), (name, model) in itertools.combinations(models.items(), 2):
            share_base(model, base, name)
        self.model = copy.deepcopy(first, {id(tensor): tensor for tensor in (*first.parameters(), *first.buffers())})
        found = [adapters(model) for model in models.values()]
        own = [own_parameters(*each) for each in zip(models.values(), found, strict=True)]
        changed = {name.rpartition(".")[0] for name in own[0] if len({id(each[name]) for each in own}) > 1}
        # A table may be read without a call of its module, so the module that reads it gets versions.
        tables = {name for name in changed if isinstance(first.get_submodule(name), nn.Embedding)}
        changed = (changed - tables) | {name.rpartition(".")[0] or name for name in tables}
        changed |= {name for each in found for name in each}
        outermost = [name for name in changed if not name.startswith(tuple(f"{other}." for other in changed))]
        for name in outermost:
            self.model.set_submodule(name, Versions([model.get_submodule(name) for model in models.values()]))

    def forward(self, names: Sequence[str], *inputs: Any, **named: Any) -> Tensor:
        """The model's output for a batch of which row i is computed with the adapter `names[i]`.

        Raises LoRAError for an unknown name, or if there are not as many names as rows.
        """
        if unknown := set(names) - set(self.names):
            raise LoRAError(f"no adapter {min(unknown)!r}; there are {', '.join(self.names)}")
        batch = next(x for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        if len(names) != len(batch):
            raise LoRAError(f"{len(names)} names of adapters for {len(batch)} rows; give one for each row")
        rows = [[i for i, chosen in enumerate(names) if chosen == name] for name in self.names]
        for module in self.modules():
            if isinstance(module, Versions):
                module.rows = [torch.tensor(each, dtype=torch.long, device=batch.device) for each in rows]
        return self.model(*inputs, **named)


def share_base(model: nn.Module, base: nn.Module, whose: str = "the model") -> None:
    """Make the parameters that neither model trains the same objects in both: those of `base`.

    From then on neither can be merged, as that would change the other. Raises LoRAError, which begins with `whose`, if
    they are of different bases, or one of them is merged.
    """
    ours, theirs = (own_parameters(each, adapters(each)) for each in (model, base))
    trained = {
        name
        for each in (model, base)
        for config in getattr(each, "adapter_configs", ())
        for name in trained_parameters(each, config)
    }
    for name in sorted((ours.keys() | theirs.keys()) - trained):
        one, other = ours.get(name), theirs.get(name)
        if one is not other and (one is None or other is None or one.dtype != other.dtype or not one.equal(other)):
            raise LoRAError(
                f"{whose}: {name} is not that of the other adapters' base; use adapters of one base, unmerged"
            )
    shared = {id(parameter): theirs[name] for name, parameter in ours.items() if name not in trained}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, shared.get(id(parameter), parameter))
    for each in (model, base):
        for adapter in adapters(each).values():
            adapter.shares_base = True
