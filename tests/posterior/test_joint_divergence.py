"""Divergences of joint Gaussians against torch.distributions and closed forms."""

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from scalabl.core.errors import UserError
from scalabl.posterior.joint import JointGaussian

RANKS = {"a": 3, "b": 2, "c": 4}
SIZE = sum(RANKS.values())


def some(seed: int, ranks: dict[str, int] = RANKS) -> JointGaussian:
    root = torch.randn(SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return JointGaussian(torch.linalg.cholesky(root @ root.T / SIZE).float(), ranks)


def test_the_divergence_is_that_of_two_multivariate_normals() -> None:
    p, q = some(0), some(1)
    normals = [MultivariateNormal(torch.zeros(SIZE).double(), scale_tril=x.factor.double()) for x in (p, q)]
    assert p.kl(q) == pytest.approx(kl_divergence(*normals).item(), rel=1e-9)
    assert q.kl(p) == pytest.approx(kl_divergence(*reversed(normals)).item(), rel=1e-9)
    assert p.kl(p) == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="other layers"):
        p.kl(some(1, {"a": 2, "b": 3, "c": 4}))


def test_two_correlated_numbers_have_a_divergence_in_closed_form() -> None:
    """KL(p || marginals) = KL(conditionals || p) = -1/2 log(1 - rho^2), the mutual information, at any scale."""
    rho, expected = 0.8, -0.5 * torch.log(torch.tensor(1 - 0.8**2)).item()
    for scale in (torch.tensor([1.0, 1.0]), torch.tensor([30.0, 0.01])):
        covariance = torch.outer(scale, scale) * torch.tensor([[1, rho], [rho, 1]])
        p = JointGaussian(torch.linalg.cholesky(covariance.double()).float(), {"a": 2})
        assert p.kl(p.restricted("diagonal")) == pytest.approx(expected, rel=1e-5)
        assert p.restricted("diagonal", "conditional").kl(p) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("structure", ["layer", "diagonal"])
def test_each_restriction_is_the_nearest_of_its_structure(structure: str) -> None:
    """Marginal blocks minimise KL(p || q), conditional ones KL(q || p): no q near them does better."""
    p = some(2)
    marginal, conditional = (p.restricted(structure, kept) for kept in ("marginal", "conditional"))  # type: ignore[arg-type]
    assert p.kl(marginal) < p.kl(conditional) and conditional.kl(p) < marginal.kl(p)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        moved = []
        for best in (marginal, conditional):
            change = (1 + 0.05 * torch.randn(SIZE, SIZE, generator=generator)) * (best.factor != 0)
            moved.append(JointGaussian(best.factor * change, p.ranks))
        assert p.kl(moved[0]) > p.kl(marginal) and moved[1].kl(p) > conditional.kl(p)


def test_independent_layers_are_a_joint_without_correlations_between_them() -> None:
    blocks = {name: some(r).factor[:r, :r] for name, r in RANKS.items()}
    joint = JointGaussian(torch.block_diag(*blocks.values()), RANKS)
    assert joint.kl(joint.restricted("layer")) == pytest.approx(0, abs=1e-6)
    for name, factor in joint.marginals.items():
        torch.testing.assert_close(factor.float(), blocks[name])
