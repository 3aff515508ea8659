"""EVA: A of each adapted layer starts at the directions in which the layer's inputs vary most, B at zero.

    X - mean(X) = U S V^T,     A = V_r^T (r, in),     B = 0

X (tokens, in) holds the layer's inputs at the real tokens of many batches, V_r the r right singular vectors with the
largest singular values: the principal components of X, found batch by batch until the next no longer turns any of them.
Layers with equal inputs, such as query, key and value, share one decomposition. The paper then divides the ranks among
the layers by explained variance, each up to rho r; here rho is 1, so all stay as they were set. The numbers are peft's.
Source: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
section 3.2 and algorithm 1; the PCA is that of Ross et al. 2008, "Incremental Learning for Robust Visual Tracking".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor, nn

from lora.errors import LoRAError
from lora.linear import LoRALinear

_Batch = tuple[Tensor, Callable[[], object]]


@dataclass(frozen=True)
class EvaConfig:
    """Settings of EVA, as peft's `EvaConfig`. Raises LoRAError for a value outside its range."""

    rho: float = 1.0
    """Largest rank of a layer, divided by the one that is set: 1, as ranks are not redistributed here (in peft 2)."""
    tau: float = 0.99
    """Cosine similarity of a component before and after a batch, from which it counts as converged."""

    def __post_init__(self) -> None:
        if self.rho != 1:
            raise LoRAError(f"lora: eva_config.rho is {self.rho!r}; ranks are not redistributed, so it must be 1")
        if not 0 <= self.tau <= 1:
            raise LoRAError(f"lora: eva_config.tau is {self.tau!r}; it is a cosine similarity in [0, 1]")


class IncrementalPCA:
    """The first `rank` principal components of rows that arrive in batches: `components` (rank, in), of length 1."""

    def __init__(self, rank: int) -> None:
        self.rank, self.rows, self.similarity = rank, 0, -1.0  # the smallest cosine of a component before and after
        self.mean, self.singular_values, self.components = torch.zeros(()), torch.empty(0), torch.empty(0)

    def add(self, X: Tensor) -> None:
        """Update the components by the n rows X (n, in), float32; with fewer rows than components, leave them out.

            U S' V'^T = [S V^T; X - mean(X); sqrt(m n / (m + n)) (mean - mean(X))]      SVD of the stacked rows

        m rows came before, with the mean `mean` (in,); S (r,) and V^T (r, in) are their singular values and components.
        The r largest of S' and V' are kept (Ross et al. 2008).
        """
        if (n := len(X)) < self.rank:
            return
        before = self.rows
        mean = (self.mean * before + X.sum(dim=0, dtype=torch.float64)) / (before + n)
        if before == 0:
            X = (X - mean).to(X.dtype)
        else:  # these have the scatter matrix of all m + n rows about their common mean, up to components left out
            shift = (before / (before + n) * n) ** 0.5 * (self.mean - X.mean(dim=0))
            X = torch.vstack((self.singular_values[:, None] * self.components, X - X.mean(dim=0), shift))
        with torch.random.fork_rng():
            torch.manual_seed(42)  # peft's
            _, S, V = torch.svd_lowrank(X, q=min(2 * self.rank, *X.shape), niter=4)
        components = V.T[: self.rank]
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        components = components * largest.sign()  # a singular vector has no sign of its own
        if before:
            self.similarity = float(torch.cosine_similarity(components, self.components).min())
        self.rows, self.mean, self.singular_values, self.components = before + n, mean, S[: self.rank], components


@torch.no_grad()
def initialize_from_inputs(layers: Mapping[str, LoRALinear], batches: Iterable[_Batch], settings: EvaConfig) -> int:
    """Set A of new layers, whose B is zero, from their inputs; returns how many of the `batches` it took.

    A batch is the mask (batch, seq) of the real tokens and a function that runs the model on it, without dropout.
    Raises LoRAError, before a layer is changed, for one without inputs (batch, seq, in), for two ranks over the same
    inputs, and if the batches end before all components have converged.
    """
    groups: dict[int, list[str]] = {}
    first = [*islice(remaining := iter(batches), 1)]
    for batch in first:  # run twice, as in peft: once to find which inputs are equal
        _watch(layers, batch, lambda name, X: groups.setdefault(hash(X.cpu().numpy().tobytes()), []).append(name))
    if without := layers.keys() - {name for names in groups.values() for name in names}:
        raise LoRAError(f"lora: init is 'eva', but {min(without)} has no inputs; choose other target_modules")
    for names in groups.values():
        if len({layers[name].rank for name in names}) > 1:
            raise LoRAError(f"lora: init is 'eva', and {' and '.join(names)} have equal inputs; give them one rank")
    found = {names[0]: IncrementalPCA(layers[names[0]].rank) for names in groups.values()}
    for used, batch in enumerate(chain(first, remaining)):
        left = {name: layers[name] for name, pca in found.items() if not pca.similarity >= settings.tau}
        if not left:
            for name, leader in ((name, names[0]) for names in groups.values() for name in names):
                layers[name].lora_A.copy_(found[leader].components)
            return used
        _watch(left, batch, lambda name, X: found[name].add(X))
    raise LoRAError(
        f"lora: init is 'eva', but {min(left)} has not converged in {used + 1} batches; lower eva_config.tau"
    )


def _watch(layers: Mapping[str, nn.Module], batch: _Batch, receive: Callable[[str, Tensor], None]) -> None:
    """Run a batch, and give `receive` the name and the inputs (tokens, in), in float32, of each of the `layers`."""
    mask, run = batch

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[:-1] != mask.shape:
            raise LoRAError(f"lora: init is 'eva', but {name} has no input for each token; choose other targets")
        with torch.autocast(mask.device.type, enabled=False):
            receive(name, inputs[0][mask].float())

    handles = [layer.register_forward_pre_hook(partial(watch, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
