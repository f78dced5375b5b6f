"""The stochastic leaf: what stands in the place of LoRA's A, and the only place where noise meets a forward pass.

    y = W0 x + (alpha / r) B diag(s) A x,    s ~ q(s) = N(s_mu, scale scale^T)        [ScalaBL, eq. of the layer]

The leaf computes diag(s) A x. Its rows carry independent draws of s, one a sequence: row i of a batch has its own
s in every position of the sequence.

PEFT's LoRA forward pass reads only the dtype of `lora_A.weight`. Computing the mean diag(s_mu) A for that takes a norm,
a division, an exponential and a product in every layer of every pass, kernels that count where launching them is what
takes time: it is a tensor that is computed when its numbers are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from scalabl.core.errors import UserError
from scalabl.posterior.gaussian import POSTERIORS, Gaussian
from scalabl.tuner.threads import Scope


class MeanWeight(Tensor):
    """A tensor whose numbers are those of a function, called at their first use; differentiable as they are.

    dtype, shape and device are known without it. Any other function of torch is given the numbers, so that no result
    is a MeanWeight. What lies in its own memory is NaN: what comes past torch's functions (an assignment to `.data`,
    an extension in C++) shows at once.
    """

    _compute: Callable[[], Tensor]
    _dtype: torch.dtype
    _differentiable: bool
    _numbers: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the numbers; read in every layer of every pass, so without torch's dispatch."""
        return self._dtype

    def numbers(self) -> Tensor:
        """The plain tensor; kept, because a pointer to its memory may have been given out (`data_ptr`)."""
        if self._numbers is None:
            with torch.set_grad_enabled(self._differentiable):
                self._numbers = self._compute()
        return self._numbers

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = tree_map_only(MeanWeight, MeanWeight.numbers, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def mean_weight(compute: Callable[[], Tensor], like: Tensor) -> Tensor:
    """The numbers of `compute()`, later, but in the present grad mode; of the shape, dtype and device of `like`."""
    made = _nan(like.shape, like.dtype, like.device).as_subclass(MeanWeight)
    made._compute, made._dtype, made._differentiable = compute, like.dtype, torch.is_grad_enabled()
    return made


@functools.cache
def _nan(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN everywhere, in the memory of one number."""
    with torch.inference_mode(False):
        return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


# getters of what is known without the numbers
_KNOWN = {getattr(Tensor, name).__get__ for name in ("shape", "device", "ndim", "is_cuda", "is_meta")}
_KNOWN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size}


@dataclass(frozen=True)
class Particles:
    """Fixed noise of N particles: rows i B .. (i + 1) B - 1 of a batch of N B rows carry particle i."""

    noise: Tensor  # (N, r)


@dataclass(frozen=True)
class Values:
    """s itself, given for every row of a batch."""

    s: Tensor  # (rows, r)


State = Literal["auto", "mean", "sample", "inactive"] | Particles | Values


class StochasticProjection(nn.Module):
    """diag(s) A, with A (r, d_in) deterministic and s Gaussian.

    Args:
        weight: (r, d_in) LoRA's own draw of A; replaced by its right singular vectors, its singular values
            become the means of s [ScalaBL, initialisation].
        covariance: "diagonal" or "full".
        init_sigma: sigma starts as U(init_sigma / sqrt(2), init_sigma), for each number.
        unit_rows: keep the rows of A at unit length in the forward pass, so that s alone carries their scale. They are
            stored at the length that LoRA's draw has, so that a step of Adam turns them as far as it turns LoRA's.
        draws: in state "auto", one draw of s a "sequence", or one a "batch", shared by its rows.

    State "auto" draws while it is trained and is the mean otherwise, in a frozen adapter too (a reference model's);
    "sample" always gives each row a draw of its own; "inactive" refuses to draw, beside an adapter with particles.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        covariance: str = "diagonal",
        init_sigma: float = 0.05,
        unit_rows: bool = True,
        draws: str = "sequence",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.unit_rows = unit_rows
        self.draws = draws
        self._state: State = "auto"
        self._scopes: list[tuple[Scope, State]] = []  # the states that contexts give it, the newest last
        self.share = (0, 1)  # while training: (rank, ranks) between which a batch is split; its rows are drawn as one
        rows, singular_values, sigma = _initial(weight, init_sigma)
        stored = singular_values[:, None] * rows if unit_rows else rows
        self.direction = nn.Parameter(stored.to(weight.dtype))
        self.posterior: Gaussian = POSTERIORS[covariance](singular_values, sigma)

    @property
    def state(self) -> State:
        """What the rows of the calling thread's passes carry; setting it is for all threads."""
        for scope, state in reversed(self._scopes):
            if scope.holds_here():
                return state
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state

    def enter(self, scope: Scope, state: State) -> None:
        """Take a state for as long as a scope is open."""
        self._scopes = [entry for entry in self._scopes if entry[0].is_open] + [(scope, state)]

    def leave(self, scope: Scope) -> None:
        """Forget a scope and what it gave."""
        self._scopes = [entry for entry in self._scopes if entry[0] is not scope]

    def rows(self) -> Tensor:
        """(r, d_in) the projection A as the forward pass uses it."""
        if self.unit_rows:
            return F.normalize(self.direction, dim=1)
        return self.direction

    @property
    def weight(self) -> Tensor:
        """(r, d_in) diag(s_mu) A, the mean: what merging and exporting read, and PEFT's forward pass for its dtype."""
        # a compiler drops what is not used; shards and other kinds of tensors have ways of their own
        if torch.compiler.is_compiling() or type(self.direction) is not nn.Parameter:
            return self._mean_weight()
        return mean_weight(self._mean_weight, self.direction)

    def _mean_weight(self) -> Tensor:
        return (self.posterior.mean[:, None] * self.rows()).to(self.direction.dtype)

    def draw(self, rows: int, device: torch.device) -> Tensor:
        """s for every row of a batch: (rows, r); (1, r) or (r,) when all rows carry the same."""
        state = self.state
        if isinstance(state, Values):
            return state.s
        if state == "inactive":
            raise UserError(
                "The active adapter was changed among particles, which are another adapter's; call set_adapter before "
                "scalabl.particles."
            )
        if isinstance(state, Particles):
            number = state.noise.shape[0]
            if rows % number:
                raise UserError(
                    f"A batch of {rows} rows cannot carry {number} particles: repeat the inputs {number} times "
                    f"(rows i*B..(i+1)*B-1 carry particle i)."
                )
            s = self.posterior.sample(state.noise.to(device))
            return s.repeat_interleave(rows // number, dim=0)
        if not _is_mean(self):
            one_for_all = state == "auto" and self.draws == "batch"  # for the rows of all ranks too
            number, (rank, ranks) = (1, (0, 1)) if one_for_all else (rows, self.share)
            noise = torch.randn(ranks * number, self.out_features, device=device)
            return self.posterior.sample(noise[rank * number : (rank + 1) * number])
        return self.posterior.mean

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, ..., d_in) -> (rows, ..., r); the first dimension counts sequences."""
        if x.dim() < 3 and not _is_mean(self):
            raise UserError(
                "A stochastic layer got its tokens flattened, without a batch dimension, so a draw cannot belong to "
                "a sequence; remove expert layers, poolers and padding-free batches from target_modules."
            )
        s = self.draw(x.shape[0], x.device)
        if s.dim() == 2:
            s = s.view(s.shape[0], *([1] * (x.dim() - 2)), s.shape[1])
        projected = F.linear(x, self.rows())
        # s is float32 and stays so: under bfloat16 only the product is rounded, not s
        return (projected * s).to(projected.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, unit_rows={self.unit_rows}"


def _is_mean(leaf: StochasticProjection) -> bool:
    """Whether every row carries the mean."""
    if leaf.state != "auto":
        return leaf.state == "mean"
    return not (leaf.training and _learns(leaf))


def _learns(leaf: StochasticProjection) -> bool:
    q = leaf.posterior
    return leaf.direction.requires_grad or q.log_mean.requires_grad or q.log_std.requires_grad


def untrained(model: nn.Module) -> list[StochasticProjection]:
    """The leaves of a model that are frozen now: of inactive adapters, and of those loaded to be read."""
    return [leaf for leaf in model.modules() if isinstance(leaf, StochasticProjection) and not _learns(leaf)]


def _initial(weight: Tensor, init_sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """A = U diag(sv) V^T -> rows V^T (r, d_in), means sv (r,), sigmas (r,); U is dropped."""
    r, d_in = weight.shape
    if weight.is_meta:
        blank = torch.empty(r, device="meta")
        return torch.empty(r, d_in, device="meta"), blank, blank
    _, singular_values, rows = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    low = init_sigma / 2**0.5
    sigma = low + (init_sigma - low) * torch.rand(r, device=weight.device)
    # a zero matrix (no LoRA draw yet, about to be loaded) must not make log(0)
    # contiguous: sharding (FSDP 2) refuses the strides that the SVD returns, and a loaded adapter does not have them
    return rows.contiguous(), singular_values.clamp_min(1e-6), sigma
