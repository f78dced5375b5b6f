"""Gradient checkpointing, automatic mixed precision and torch.compile."""

import pytest
import torch
from matrix import adapt, close, load_base, logits, tokens
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

import scalabl
from scalabl.tuner import stochastic_layers

IDS = tokens(3)


def gradients(model: PeftModel, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of one training step whose draws come from `seed`."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputation_sees_the_same_draw(use_reentrant: bool, name: str) -> None:
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    model = adapt(load_base(name), target_modules=targets, covariance="full")
    plain = gradients(model)
    sigma = next(name for name in plain if name.endswith("log_std"))
    assert not close(gradients(model, seed=1)[sigma], plain[sigma], 1e-2), "another draw has another gradient"
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpointed = gradients(model)
    assert checkpointed.keys() == plain.keys()
    assert all(close(checkpointed[key], plain[key], 1e-5) for key in plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_particles_hold_in_recomputation(use_reentrant: bool) -> None:
    """The context may end before the backward pass of another batch, but not before its own."""
    model = adapt(load_base())
    with scalabl.particles(model, 3, seed=0):
        plain = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        checkpointed = gradients(model, seed=99)
    assert all(close(checkpointed[key], plain[key], 1e-5) for key in plain)


def test_mixed_precision_trains_with_draws_in_float32() -> None:
    model = adapt(load_base())
    exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model)
    assert mixed.keys() == exact.keys()
    for name, gradient in mixed.items():
        assert gradient.dtype == torch.float32 and close(gradient, exact[name], 0.1), name


@pytest.fixture
def one_layer() -> PreTrainedModel:
    """For a fresh compiler, which takes as long as there are layers."""
    torch._dynamo.reset()
    return load_base(num_hidden_layers=1)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_compiled_models_answer_as_eager_ones(one_layer: PreTrainedModel, covariance: str) -> None:
    model = adapt(one_layer, covariance=covariance).eval()
    compiled = torch.compile(model, backend="aot_eager")
    assert close(logits(compiled, IDS), logits(model, IDS), 1e-5)
    with scalabl.particles(model, 3, seed=0):
        eager = logits(model, IDS)
        assert close(logits(compiled, IDS), eager, 1e-5)
    with scalabl.particles(compiled, 3, seed=1):
        assert close(logits(compiled, IDS), logits(model, IDS), 1e-5)
        assert not close(logits(compiled, IDS), eager, 1e-3)
    assert close(logits(compiled, IDS), logits(model, IDS), 1e-5)


def test_a_compiled_model_trains_with_a_fresh_draw_a_row_and_a_pass(one_layer: PreTrainedModel) -> None:
    model = adapt(one_layer)
    compiled = torch.compile(model, backend="aot_eager")
    rows = IDS[:1].expand(2, -1)
    model.train()
    first, second = logits(compiled, rows), logits(compiled, rows)
    assert not close(first[0], first[1], 1e-3) and not close(first, second, 1e-3)
    compiled(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_the_leaf_compiles_without_a_graph_break(one_layer: PreTrainedModel) -> None:
    leaf = next(iter(stochastic_layers(adapt(one_layer)).values()))
    x = torch.randn(2, 3, leaf.in_features)
    for training in (True, False):
        leaf.train(training)
        out = torch.compile(leaf, backend="aot_eager", fullgraph=True)(x)
        assert out.shape == (2, 3, 4)
    assert close(out, leaf(x), 1e-6)
