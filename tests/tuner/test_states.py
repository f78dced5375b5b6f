"""The contexts mean, sample and particles, and the sum of the KL over a model."""

import pytest
import torch
from matrix import adapt, close, load_base, logits, tokens
from peft import LoraConfig, get_peft_model
from torch import nn

import scalabl
from scalabl.core.errors import UserError
from scalabl.posterior import Prior
from scalabl.tuner import stochastic_layers


class Wrapper(nn.Module):
    """What DistributedDataParallel looks like: the model under the name `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_layers_are_named_as_in_the_base_model_whatever_wraps_it() -> None:
    model = adapt(load_base())
    names = list(stochastic_layers(model))
    assert names == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    compiled = torch.compile(model, backend="eager")
    for wrapped in (Wrapper(model), compiled, Wrapper(compiled), torch.compile(Wrapper(model), backend="eager")):
        assert stochastic_layers(wrapped) == stochastic_layers(model)
        assert torch.equal(scalabl.kl_divergence(wrapped), scalabl.kl_divergence(model))
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")  # compiled layer by layer
    assert list(stochastic_layers(model)) == names


def test_particle_noise_differs_between_layers_and_is_the_same_for_another_adapter_name() -> None:
    model, ids = adapt(load_base()).eval(), tokens(1)
    other = load_base()
    other = get_peft_model(other, scalabl.ScalaBLConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="named")
    with scalabl.particles(model, 2, seed=3), scalabl.particles(other, 2, seed=3):
        noise = [leaf.state.noise for leaf in stochastic_layers(model).values()]
        others = [leaf.state.noise for leaf in stochastic_layers(other).values()]
        assert all(torch.equal(a, b) for a, b in zip(noise, others, strict=True))
    stacked = torch.stack(noise).flatten(1)
    assert len(torch.unique(stacked, dim=0)) == len(noise)
    assert logits(model, ids).shape[0] == 1


def test_contexts_nest_and_leave_the_state_they_found_even_after_an_error() -> None:
    model, ids = adapt(load_base()).eval(), tokens(2)
    mean = logits(model, ids)
    with scalabl.particles(model, 2, seed=1):
        outer = logits(model, ids)
        with scalabl.mean(model):
            assert torch.equal(logits(model, ids), mean)
        assert torch.equal(logits(model, ids), outer)
        with pytest.raises(RuntimeError, match="stop"), scalabl.sample(model):
            raise RuntimeError("stop")
        assert torch.equal(logits(model, ids), outer)
    assert torch.equal(logits(model, ids), mean)


def test_padding_does_not_change_a_particles_answer() -> None:
    model, ids = adapt(load_base()).eval(), tokens(2)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    with scalabl.particles(model, 2, seed=1):
        assert close(logits(model, padded, attention_mask=mask)[:, 3:], logits(model, ids), 1e-5)


@pytest.mark.parametrize(
    ("number", "options"),
    [(0, {}), (-1, {}), (2, {"indices": [1]}), (1, {"indices": [-1]}), (1, {"first": -1})],
)
def test_impossible_particles_are_refused(number: int, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="counted from 1"):
        scalabl.particles(adapt(load_base()), number, **options)  # type: ignore[arg-type]


def test_rows_that_do_not_fit_and_mixed_adapters_are_refused_under_particles() -> None:
    model = adapt(load_base()).eval()
    with scalabl.particles(model, 2):
        with pytest.raises(UserError, match="3 rows cannot carry 2 particles"):
            logits(model, tokens(3))
        with pytest.raises(UserError, match="adapter_names cannot be given under particles"):
            logits(model, tokens(2), adapter_names=["default", "__base__"])
    assert logits(model, tokens(2), adapter_names=["default", "__base__"]).isfinite().all()


@pytest.mark.parametrize("use", [scalabl.mean, scalabl.sample, scalabl.kl_divergence, stochastic_layers])
def test_a_plain_lora_is_refused(use: object) -> None:
    model = get_peft_model(load_base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="No stochastic layer in adapter default"), use(model):  # type: ignore[operator]
        pass


def test_the_kl_of_a_model_is_the_sum_over_its_layers() -> None:
    model = adapt(load_base(), covariance="full", prior_mean=0.3, prior_std=0.7)
    expected = sum(leaf.posterior.kl(Prior(0.3, 0.7)) for leaf in stochastic_layers(model).values())
    kl = scalabl.kl_divergence(model)
    assert kl.shape == () and kl.item() == pytest.approx(float(expected), rel=1e-6)
    kl.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".posterior." in name), name
