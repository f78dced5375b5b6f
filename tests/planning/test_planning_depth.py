"""Two layers of a kind and one more tell what all of them take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from real_step import ROWS, meta_run, settings_of
from torch import nn

from scalabl.planning.meta_model import over_depth
from scalabl.planning.plan import Planner


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"layers": "last:3"}])
def test_a_deep_model_is_told_from_a_shallow_one(architecture: str, changes: dict[str, Any]) -> None:
    settings = settings_of(architecture, depth=6, **changes)
    planner, run = Planner(settings, "cpu"), meta_run(settings)
    rows = replace(ROWS, batch=6)
    training = planner.training(rows)
    forward, whole = run.training_step(rows, 6)
    staying = planner.counts.weights + planner.counts.adapter + planner.optimizer
    assert (training.activations, training.peak, training.flops) == (forward.kept, staying + whole.peak, whole.flops)
    for samples in (0, 3):
        use, planned = run.prediction(rows, 6, samples), planner.prediction(rows, samples)
        assert (planned.activations, planned.flops) == (use.peak, use.flops)
    assert planner.key_value_cache(40) == run.key_value_cache(40)


def test_fewer_layers_are_run_than_there_are() -> None:
    class Layer(nn.Module):
        runs = 0

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            Layer.runs += 1
            return hidden

    layers = nn.ModuleList(Layer() for _ in range(40))
    original = list(layers)

    def measure() -> tuple[int, ...]:
        before = Layer.runs
        hidden = torch.ones(1)
        for layer in layers:
            hidden = layer(hidden)
        return (7 + 3 * (Layer.runs - before),)

    assert over_depth(layers, ["a"] * 30 + ["b"] * 10, measure) == (7 + 3 * 40,)
    assert Layer.runs == 4 + 5 + 5
    assert list(layers) == original


def test_layers_of_another_form_are_all_run() -> None:
    class Tuple(nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
            return (hidden,)

    layers = nn.ModuleList(Tuple() for _ in range(9))

    def measure() -> tuple[int, ...]:
        hidden = torch.ones(1)
        for layer in layers:
            made = layer(hidden)
            hidden = made[0] if isinstance(made, tuple) else made
        return (sum(isinstance(layer, Tuple) for layer in layers),)

    assert over_depth(layers, ["a"] * 9, measure) == (9,)
