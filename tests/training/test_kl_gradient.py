"""Layers computed together get exactly what each would get alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from scalabl.posterior import DiagonalGaussian, Gaussian, Prior, forward_kl_gradient
from scalabl.posterior.gaussian import POSTERIORS
from scalabl.training.kl import add_kl_gradients, with_parameters


def layers(*kinds_and_ranks: tuple[str, int], gradients: bool = True) -> list[Gaussian]:
    """Posteriors of random parameters with random gradients."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for kind, r in kinds_and_ranks:
        posterior = POSTERIORS[kind](torch.ones(r), torch.full((r,), 0.3))
        for parameter in posterior.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if gradients:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        made.append(posterior)
    return made


def gradients_of(posteriors: list[Gaussian]) -> list[torch.Tensor | None]:
    return [parameter.grad for posterior in posteriors for parameter in posterior.parameters()]


MIXED = [("diagonal", 8), ("full", 8), ("diagonal", 8), ("diagonal", 4), ("full", 8), ("diagonal", 8), ("full", 3)]


@pytest.mark.parametrize("prior", [Prior(), Prior(0.2, 0.7), Prior(0.2, empirical=True)])
@pytest.mark.parametrize("present", [True, False])
def test_together_and_alone_are_equal_to_the_last_bit(prior: Prior, present: bool) -> None:
    together, alone, by_hand = (layers(*MIXED, gradients=present) for _ in range(3))
    add_kl_gradients(together, prior, 1 / 7)
    for posterior in alone:
        add_kl_gradients([posterior], prior, 1 / 7)
    for posterior in by_hand:
        for name, gradient in posterior.kl_gradient(prior).items():
            parameter = posterior.get_parameter(name)
            added = 1 / 7 * gradient
            parameter.grad = added if parameter.grad is None else parameter.grad + added
    for one, other, wanted in zip(*map(gradients_of, (together, alone, by_hand)), strict=True):
        assert one is not None and other is not None and wanted is not None
        assert torch.equal(one, other) and torch.equal(one, wanted) and one.abs().max() > 0


def test_forward_kl_together_is_that_of_each() -> None:
    together = layers(*[("diagonal", 8)] * 3, gradients=False)
    add_kl_gradients(together, Prior(0.1, 0.5), 0.25, "forward")
    for posterior in together:
        assert isinstance(posterior, DiagonalGaussian)
        for name, gradient in forward_kl_gradient(posterior, Prior(0.1, 0.5)).items():
            assert torch.equal(posterior.get_parameter(name).grad, 0.25 * gradient)  # type: ignore[arg-type]


def test_layers_of_one_shape_are_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for kind in POSTERIORS.values():
        original: Any = kind.kl_gradient
        monkeypatch.setattr(
            kind, "kl_gradient", lambda self, prior, original=original: calls.append(self) or original(self, prior)
        )
    add_kl_gradients(layers(*MIXED), Prior(), 1.0)
    assert len(calls) == 4  # diagonal of rank 8 and 4, full of rank 8 and 3


def test_frozen_parameters_get_none_and_gradients_are_not_shared() -> None:
    posteriors = layers(*[("diagonal", 4)] * 3, gradients=False)
    posteriors[1].log_std.requires_grad_(False)
    add_kl_gradients(posteriors, Prior(), 1.0)
    assert posteriors[1].log_std.grad is None
    assert all(p.grad is not None for q in posteriors for p in q.parameters() if p.requires_grad)
    before = posteriors[2].log_mean.grad.clone()  # type: ignore[union-attr]
    posteriors[0].log_mean.grad.zero_()  # type: ignore[union-attr]
    assert torch.equal(posteriors[2].log_mean.grad, before) and before.any()  # type: ignore[arg-type]
    storages = {p.grad.untyped_storage().data_ptr() for q in posteriors for p in q.parameters() if p.grad is not None}
    assert len(storages) == 5


def test_other_parameters_leave_the_original_as_it_is() -> None:
    (posterior,) = layers(("full", 3))
    before = {name: parameter.clone() for name, parameter in posterior.named_parameters()}
    other = with_parameters(posterior, {name: torch.zeros_like(p) for name, p in posterior.named_parameters()})
    assert torch.equal(other.mean, torch.ones(3)) and torch.equal(other.covariance(), torch.eye(3))
    assert all(torch.equal(p, before[name]) for name, p in posterior.named_parameters())
    assert type(other) is type(posterior)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which this process is the second; nothing is sent."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield DeviceMesh("cpu", torch.arange(2))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("present", [True, False])
def test_shards_together_get_their_part_of_what_the_whole_gets(
    mesh: DeviceMesh, present: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, whole = layers(*MIXED, gradients=present), layers(*MIXED, gradients=present)

    def shard(tensor: torch.Tensor) -> DTensor:
        part = tensor.detach().chunk(2)[1].clone() if tensor.shape[0] > 1 else tensor.detach()[:0]
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=(1,))

    for posterior in shards:
        for name, parameter in list(posterior.named_parameters()):
            sharded = torch.nn.Parameter(shard(parameter))
            sharded.grad = None if parameter.grad is None else shard(parameter.grad)
            posterior.register_parameter(name, sharded)
    calls: list[Gaussian] = []
    for kind in POSTERIORS.values():
        original: Any = kind.kl_gradient
        monkeypatch.setattr(
            kind, "kl_gradient", lambda self, prior, original=original: calls.append(self) or original(self, prior)
        )
    add_kl_gradients(shards, Prior(0.2, 0.7), 1 / 7)
    assert len(calls) == 4  # not one a layer
    add_kl_gradients(whole, Prior(0.2, 0.7), 1 / 7)
    for found, wanted in zip(gradients_of(shards), gradients_of(whole), strict=True):
        assert isinstance(found, DTensor) and wanted is not None and found.shape == wanted.shape
        assert torch.equal(found.to_local(), wanted.chunk(2)[1]) and found.to_local().numel() > 0


def test_the_number_of_operations_does_not_grow_with_the_layers() -> None:
    def operations(number: int) -> int:
        counted = Counter()
        posteriors = layers(*[("diagonal", 8)] * number)
        with counted:
            add_kl_gradients(posteriors, Prior(), 1.0)
        return counted.number

    assert operations(2) == operations(60) > 0


class Counter(TorchDispatchMode):
    """Counts what computes numbers; a view does not."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))
