"""The joint Gaussian: its draws, its linearisation, its parts, and its file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_base import adapted, loaded, questions

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, JOINT
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive import MonteCarloPredictive, predict
from scalabl.predictive.linearized import logit_gaussian, logit_jacobian
from scalabl.scoring import Letters, Scorer
from scalabl.tuner import particles, stochastic_layers
from scalabl.tuner.joint import joint_of, load_joint, save_joint, set_joint


def some_joint(ranks: dict[str, int], sigma: float = 0.1) -> JointGaussian:
    """Standard deviations around sigma, and a correlation of 0.8 or -0.8 between any two numbers."""
    size = sum(ranks.values())
    generator = torch.Generator().manual_seed(5)
    sign = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    std = sigma * (0.7 + 0.6 * torch.rand(size, generator=generator).double())
    correlation = 0.2 * torch.eye(size).double() + 0.8 * torch.outer(sign, sign)
    return JointGaussian(torch.linalg.cholesky(torch.outer(std, std) * correlation).float(), ranks)


def scorer_with_joint(sigma: float = 0.1) -> Scorer:
    model = adapted(covariance="full", rank_pattern={"v_proj": 2})
    ranks = {name: leaf.out_features for name, leaf in stochastic_layers(model).items()}
    set_joint(model, some_joint(ranks, sigma))
    return Scorer(model, Letters(loaded()[1]))


def test_particles_have_the_moments_of_the_joint() -> None:
    scorer, number = scorer_with_joint(), 4000
    joint = joint_of(scorer.model)
    assert joint is not None
    with particles(scorer.model, number, seed=1):
        leaves = stochastic_layers(scorer.model)
        drawn = torch.cat([leaves[name].draw(number, torch.device("cpu")) for name in joint.ranks], dim=1).double()
    mean = torch.cat([leaves[name].posterior.mean for name in joint.ranks]).double()
    covariance = joint.covariance()
    std = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean) / std).abs().max() < 5 / number**0.5
    # the standard error of a correlation is at most 1 / sqrt(N)
    correlation = (covariance - torch.cov(drawn.T)) / torch.outer(std, std)
    assert correlation.abs().max() < 8 / number**0.5
    between = covariance[: joint.ranks["model.layers.0.self_attn.q_proj"], -2:]
    assert between.abs().max() > 0.3 * std.max() ** 2


def test_each_layer_alone_has_its_block() -> None:
    scorer = scorer_with_joint()
    joint = joint_of(scorer.model)
    assert joint is not None
    leaves = stochastic_layers(scorer.model)
    for name, rows in joint.blocks():
        block = joint.covariance()[rows, rows].float()
        torch.testing.assert_close(leaves[name].posterior.covariance().detach(), block, rtol=1e-4, atol=1e-8)


def test_the_linearised_covariance_is_the_dense_product() -> None:
    scorer = scorer_with_joint()
    batch = scorer.scoring.collate([scorer.scoring.encode(row) for row in questions(5)])
    joint = joint_of(scorer.model)
    assert joint is not None
    _, jacobians = logit_jacobian(scorer, batch)
    _, found = logit_gaussian(scorer, batch)
    dense = torch.cat([jacobians[name] for name in joint.ranks], dim=-1).double()
    torch.testing.assert_close(found.double(), dense @ joint.covariance() @ dense.transpose(1, 2), rtol=1e-4, atol=1e-7)
    set_joint(scorer.model, None)
    _, blocks = logit_gaussian(scorer, batch)
    assert (blocks - found).abs().max() > 0.2 * found.abs().max()


def test_the_linearised_covariance_is_that_of_monte_carlo_draws_where_the_noise_is_small() -> None:
    scorer, number = scorer_with_joint(0.02), 1000
    rows = [scorer.scoring.encode(row) for row in questions(2, choices=(4,))]
    log_probs = predict(scorer, rows, MonteCarloPredictive(number, seed=1)).double()
    contrasts = (log_probs[..., 1:4] - log_probs[..., :1]).transpose(0, 1)
    found = logit_gaussian(scorer, scorer.scoring.collate(rows))[1][:, :3, :3]
    scale = found.diagonal(dim1=1, dim2=2).amax(-1)
    for drawn, expected, size in zip(contrasts, found, scale, strict=True):
        assert ((torch.cov(drawn.T) - expected) / size).abs().max() < 0.22  # 5 standard errors of a variance
    set_joint(scorer.model, None)
    blocks = logit_gaussian(scorer, scorer.scoring.collate(rows))[1][:, :3, :3]
    assert ((blocks - found) / scale[:, None, None]).abs().max() > 0.5


def test_restrictions_keep_blocks_of_the_covariance_or_of_the_precision() -> None:
    joint = some_joint({"a": 3, "b": 2})
    covariance, precision = joint.covariance(), torch.linalg.inv(joint.covariance())
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).double()
    for structure, mask in (("layer", blocks), ("diagonal", torch.eye(5).double())):
        marginal = joint.restricted(structure).covariance()  # type: ignore[arg-type]
        torch.testing.assert_close(marginal, covariance * mask, rtol=1e-5, atol=1e-9)
        conditional = joint.restricted(structure, "conditional").covariance()  # type: ignore[arg-type]
        torch.testing.assert_close(torch.linalg.inv(conditional), precision * mask, rtol=1e-4, atol=1e-3)
        assert (conditional.diagonal() <= marginal.diagonal() * (1 + 1e-6)).all()
    assert joint.restricted("joint") is joint
    with pytest.raises(UserError, match="structure is 'block'"):
        joint.restricted("block")  # type: ignore[arg-type]


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    joint = some_joint({"a.b": 3, "c": 2})
    save_file({"x": torch.ones(1)}, tmp_path / ADAPTER)
    assert load_joint(tmp_path) is None
    save_joint(tmp_path, joint)
    loaded_again = load_joint(tmp_path)
    assert loaded_again is not None
    assert torch.equal(loaded_again.factor, joint.factor) and loaded_again.ranks == joint.ranks
    save_file({"x": torch.zeros(1)}, tmp_path / ADAPTER)
    with pytest.raises(UserError, match="another adapter"):
        load_joint(tmp_path)
    (tmp_path / JOINT).write_bytes((tmp_path / JOINT).read_bytes()[:200])
    with pytest.raises(UserError, match="truncated or altered"):
        load_joint(tmp_path)


def test_it_belongs_to_one_adapter() -> None:
    scorer = scorer_with_joint()
    model = scorer.model
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    assert joint_of(model) is not None
    model.set_adapter("other")
    assert joint_of(model) is None
    model.set_adapter("default")
    assert joint_of(model) is not None


def test_other_layers_and_diagonal_ones_are_refused() -> None:
    model = adapted()
    ranks = {name: leaf.out_features for name, leaf in stochastic_layers(model).items()}
    with pytest.raises(UserError, match='covariance="full"'):
        set_joint(model, some_joint(ranks))
    with pytest.raises(UserError, match="other layers"):
        set_joint(model, some_joint({"a": 3}))
    with pytest.raises(UserError, match="factor of 4 x 4"):
        JointGaussian(torch.eye(3), {"a": 4})
