"""Muon: momentum whose matrices are orthogonalized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ldm.config import config_field
from ldm.devices import default_dtype
from ldm.errors import ConfigError
from ldm.nn.input_output import is_input_or_output
from ldm.training.optimizers.adamw import AdamW
from ldm.training.optimizers.optimizer import FACTOR, OptimizerConfig, decay_groups, trainable
from ldm.training.sharded_tensors import by_sharding, full_tensor, sharded_like

if TYPE_CHECKING:
    from ldm.training.config import TrainConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, chosen for a steep slope at 0 (Jordan et al. 2024)."""

BATCH_ELEMENTS = 2**26
"""Number of elements of the matrices of one shape that are orthogonalized together, which bounds the memory for it."""

WIDE = 4
"""Columns for each row from which on several iterations are computed from one Gram matrix. With fewer it saves little; in bf16 it
has about twice the error, 3 % of the update of a random matrix."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights are matrices, or become one when they are flattened from their second dimension."""


@dataclass(frozen=True)
class MuonConfig(OptimizerConfig, kind="muon"):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for hidden matrices and convolutions, else AdamW.

    AdamW trains everything else: input and output layers, embeddings, biases, norms and scales. ``train.betas`` are those of
    AdamW; ``train.weight_decay`` applies to both.
    """

    momentum: float = config_field(0.95, "momentum of Muon", changeable=True)
    nesterov: bool = config_field(True, "Nesterov's form of the momentum", changeable=True)
    iterations: int = config_field(5, "Newton-Schulz iterations of the orthogonalization", changeable=True)
    scale: Literal["adamw", "spectral"] = config_field(
        "adamw",
        "scale of the update of an m x n matrix: adamw = 0.2 sqrt(max(m, n)), the size of AdamW's updates, so that its learning "
        "rates and weight decays apply (Liu et al. 2502.16982); spectral = sqrt(max(1, m / n)) (Jordan et al.)",
        changeable=True,
    )
    learning_rate_factor: float = config_field(
        1.0, "learning rate of Muon as a multiple of that of AdamW, train.learning_rate", changeable=True
    )
    adamw_layers: tuple[str, ...] = config_field(
        (),
        "more layers whose weights AdamW trains, apart from input and output layers: patterns of their names, complete or after "
        "the last point, such as to_q",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or self.iterations < 1 or not 0 < self.learning_rate_factor < math.inf:
            raise ConfigError(
                f"momentum {self.momentum} must be in [0, 1), iterations {self.iterations} at least 1, and "
                f"learning_rate_factor {self.learning_rate_factor} above 0 and finite."
            )

    def build(self, modules: Iterable[nn.Module], train: TrainConfig) -> Muon:
        modules = list(modules)
        matrices = list(hidden_matrices(modules, self.adamw_layers))
        own = set(matrices)
        muon = {
            "params": matrices,
            "weight_decay": train.weight_decay,
            "muon": True,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "iterations": self.iterations,
            "scale": self.scale,
            FACTOR: self.learning_rate_factor,
        }
        others = decay_groups([each for each in trainable(modules) if each not in own], train.weight_decay)
        return Muon([muon, *others], lr=train.learning_rate, betas=train.betas, fused=True)


def hidden_matrices(modules: Iterable[nn.Module], excluded: Sequence[str]) -> Iterator[nn.Parameter]:
    """Yield the trainable weights of hidden linear layers and convolutions, but those of layers whose names match ``excluded``.

    Networks mark their input and output layers (:mod:`ldm.nn.input_output`). Grouped convolutions are excluded too, since each
    of their groups is a matrix of its own.
    """
    found: set[nn.Parameter] = set()
    for module in modules:
        for name, layer in module.named_modules():
            hidden = isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1 and not is_input_or_output(layer)
            names = (name, name.rpartition(".")[2])
            if not hidden or any(fnmatch(each, pattern) for each in names for pattern in excluded):
                continue
            weight = layer.weight
            if isinstance(weight, nn.Parameter) and weight.requires_grad and weight not in found:
                found.add(weight)
                yield weight


class Muon(AdamW):
    """Optimizer of a :class:`MuonConfig`: Muon in the groups with ``muon``, AdamW in the others.

        B <- mu B + (1 - mu) G                          momentum
        M  = mu B + (1 - mu) G  (Nesterov), else B
        W <- (1 - lr decay) W - lr scale orthogonal(M)

    which is the description's ``B <- mu B + G`` with B divided by 1 / (1 - mu), a factor that the orthogonalization removes.
    The matrices of sharded parameters are gathered on each rank for the orthogonalization.
    """

    def adam_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not group.get("muon")]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                if group.get("muon"):
                    self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parts = by_sharding(each for each in group["params"] if each.grad is not None)
        parameters, directions = [each for part in parts for each in part], list[Tensor]()
        for part in parts:
            gradients = [each.grad for each in part if each.grad is not None]
            states = [self._state(each) for each in part]
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_add_([state["step"] for state in states], 1)
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            directions += (
                torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else list(buffers)
            )
            torch._foreach_mul_(part, 1 - group["lr"] * group["weight_decay"])
        for members in _batches(directions):
            dtype = default_dtype(directions[members[0]].device)
            matrices = torch.stack([_matrix(full_tensor(directions[i])).to(dtype) for i in members])
            rows, columns = matrices.shape[1:]
            updates = orthogonalized(matrices, group["iterations"])
            size = group["lr"] * update_scale(rows, columns, group["scale"])
            for i, update in zip(members, updates, strict=True):
                parameter = parameters[i]
                parameter.add_(sharded_like(_weight(update, parameter.shape), parameter), alpha=-size)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:  # torch's Adam expects a count of steps in each state that it loads
            state |= {"step": torch.zeros((), device=parameter.device), "momentum_buffer": torch.zeros_like(parameter)}
        return state


def _matrix(weight: Tensor) -> Tensor:
    """Return a weight as a matrix, whose columns are in the order of channels_last memory; their order changes no update."""
    return weight.movedim(1, -1).flatten(1)


def _weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Invert :func:`_matrix`."""
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of tensors of one shape as matrices, with at most ``BATCH_ELEMENTS`` elements if there are several."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_shape.setdefault((tensor.shape[0], math.prod(tensor.shape[1:])), []).append(i)
    for (rows, columns), members in by_shape.items():
        size = max(1, BATCH_ELEMENTS // (rows * columns))
        yield from (members[i : i + size] for i in range(0, len(members), size))


def orthogonalized(matrices: Tensor, iterations: int) -> Tensor:
    """Return matrices [b m n] with singular values near 1, in about [0.7, 1.2], and the same singular vectors.

    The quintic Newton-Schulz iteration X <- P X, P = a I + b G + c G^2, G = X X^T, of the matrix divided by its Frobenius norm
    (Jordan et al. 2024), in the precision of the matrices; bf16 is enough.

    The P of several iterations are computed from one G, since the next one is P G P, so that the long side of a matrix takes part
    in fewer products (Gram Newton-Schulz, https://dao-lab.ai/blog/2026/gram-newton-schulz).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for count in _iterations_at_once(iterations, wide=x.shape[2] >= WIDE * x.shape[1]):
        gram = x @ x.mT
        if count == 1:
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = _product_of_iterations(gram, count) @ x
    return x.mT if tall else x


def _product_of_iterations(gram: Tensor, count: int) -> Tensor:
    """Return the product of the P of ``count`` iterations that begin with this Gram matrix."""
    a, b, c = COEFFICIENTS
    product = None
    for i in range(count):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        product = p if product is None else p @ product
        if i < count - 1:
            gram = p @ gram @ p
    assert product is not None
    return product


def _iterations_at_once(iterations: int, wide: bool) -> Iterator[int]:
    """Yield how many iterations are computed from each Gram matrix: one, or of wide matrices three, and then two at a time.

    In bf16, rounding makes small eigenvalues negative, and more iterations from one Gram matrix would enlarge these.
    """
    count = 3 if wide else 1
    while iterations > 0:
        yield min(count, iterations)
        iterations -= count
        count = min(count, 2)


def update_scale(rows: int, columns: int, scale: str) -> float:
    """Return the factor on an orthogonal update of a matrix; see :attr:`MuonConfig.scale`."""
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "adamw" else math.sqrt(max(1.0, rows / columns))
