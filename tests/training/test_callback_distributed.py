"""Two processes give what one gives."""

from pathlib import Path
from typing import Any

import own_process
import pytest
import torch
import two_ranks
from tiny_run import arguments, largest_difference, tiny_model, trainer, weights
from two_ranks import CASES, Noise, unlike

from scalabl.tuner import kl_divergence, stochastic_layers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, in one launch: starting takes longer than all of it."""
    output = tmp_path_factory.mktemp("ranks")
    codes = [each.wait(600) for each in own_process.ranks(two_ranks.main, output, 4, directory=output, environment={})]
    assert codes == [0, 0], own_process.written(output, "err")
    return [torch.load(output / f"rank{rank}.pt") for rank in range(2)]


def test_two_ddp_ranks_equal_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    model = tiny_model()
    callback = Noise(8, learning_rate=0.05)
    trainer(model, arguments(tmp_path, max_grad_norm=0.1), [callback]).train()
    assert largest_difference(ranks[0]["weights"], ranks[1]["weights"]) == 0
    assert largest_difference(ranks[0]["weights"], weights(model)) < 1e-5
    assert largest_difference(weights(model), weights(tiny_model())) > 0.01
    # every sequence has the draw of s that one process gives it, and so different ones on different ranks
    assert not torch.equal(ranks[0]["noise"], ranks[1]["noise"])
    assert all(leaf.share == (0, 1) for leaf in stochastic_layers(model).values())


def test_shards_get_the_gradient_and_the_log_the_values_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    for case, config in CASES.items():
        model = unlike(tiny_model(**config))
        (kl_divergence(model) / 8).backward()
        for rank in ranks:
            for name, leaf in stochastic_layers(model).items():
                for parameter_name, parameter in leaf.posterior.named_parameters():
                    found = rank[case]["gradients"][f"{name}.{parameter_name}"]
                    torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)
            assert rank[case]["values"]["kl"] == pytest.approx(kl_divergence(model).item(), rel=1e-6)
