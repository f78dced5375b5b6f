"""The mean that PEFT's forward pass asks for its dtype alone is not computed for that, and is the same mean."""

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matrix import FORMATS, Format, adapt, load_base, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scalabl.tuner import StochasticProjection, stochastic_layers
from scalabl.tuner.projection import MeanWeight

IDS = tokens(3)


@pytest.fixture
def leaf() -> StochasticProjection:
    torch.manual_seed(0)
    made = StochasticProjection(torch.randn(3, 7))
    with torch.no_grad():
        made.direction.mul_(2)  # no unit rows
    return made


def mean(leaf: StochasticProjection) -> Tensor:
    return leaf.posterior.mean[:, None] * F.normalize(leaf.direction, dim=1)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_no_pass_computes_it(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the answer is that of a pass which computes it: PEFT reads the right dtype."""
    model = adapt(load_base("llama", form)).train()
    computed: list[StochasticProjection] = []
    original = StochasticProjection._mean_weight

    def counting(leaf: StochasticProjection) -> Tensor:
        computed.append(leaf)
        return original(leaf)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        model.zero_grad()
        answer = model(input_ids=IDS, labels=IDS, use_cache=False)
        answer.loss.backward()
        return answer.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    monkeypatch.setattr(StochasticProjection, "_mean_weight", counting)
    found, gradients = step()
    assert not computed
    monkeypatch.setattr(StochasticProjection, "weight", property(counting))
    wanted, with_it = step()
    assert len(computed) >= len(stochastic_layers(model))
    assert torch.equal(found, wanted)
    assert gradients.keys() == with_it.keys() and all(torch.equal(gradients[name], with_it[name]) for name in with_it)


def test_every_way_of_using_it_gives_the_mean(leaf: StochasticProjection, tmp_path: Path) -> None:
    x, wanted = torch.randn(2, 7), mean(leaf)
    found = leaf.weight
    assert isinstance(found, Tensor)
    assert (found.dtype, found.shape, found.device, found.ndim) == (torch.float32, (3, 7), wanted.device, 2)
    assert found.requires_grad and not found.is_leaf
    for one, other in [
        (found + 0, wanted), (2 * found, 2 * wanted), (x @ found.T, x @ wanted.T), (F.linear(x, found), x @ wanted.T),
        (torch.stack([found, found]), torch.stack([wanted, wanted])), (found[1:], wanted[1:]), (found.double(), wanted),
        (torch.empty(3, 7).copy_(found), wanted), (found.detach(), wanted), (found.data, wanted),
        (found.clone(), wanted),
    ]:  # fmt: skip
        assert type(one) is Tensor and torch.equal(one, other.to(one.dtype))
    assert found.tolist() == wanted.tolist() and (found.detach().numpy() == wanted.detach().numpy()).all()
    save_file({"a": found}, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], wanted)
    file = io.BytesIO()
    torch.save({"a": found.detach()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["a"], wanted)


def test_gradients_go_through_it(leaf: StochasticProjection) -> None:
    parameters = [leaf.direction, leaf.posterior.log_mean]
    factors = torch.randn(3, 7)
    found = torch.autograd.grad((leaf.weight * factors).sum(), parameters)
    wanted = torch.autograd.grad((mean(leaf) * factors).sum(), parameters)
    assert all(torch.equal(one, other) and one.any() for one, other in zip(found, wanted, strict=True))
    with torch.no_grad():
        frozen = leaf.weight
    assert not frozen.requires_grad and torch.equal(frozen + 0, mean(leaf))


def test_numbers_are_those_of_the_first_use_and_a_new_access_gives_new_ones(leaf: StochasticProjection) -> None:
    before, used = mean(leaf).detach(), leaf.weight
    assert torch.equal(used.detach(), before)
    with torch.no_grad():
        leaf.posterior.log_mean.add_(1)
    assert torch.equal(used.detach(), before)
    assert torch.equal(leaf.weight.detach(), mean(leaf)) and not torch.equal(mean(leaf), before)


def test_what_goes_past_torch_shows(leaf: StochasticProjection) -> None:
    """Assigned to `.data` it cannot be computed: NaN, and no crash; an nn.Parameter of it is refused."""
    plain = nn.Linear(7, 3, bias=False)
    plain.weight.data = leaf.weight
    assert plain(torch.ones(1, 7)).isnan().all()
    with pytest.raises(RuntimeError, match="MeanWeight"):
        nn.Parameter(leaf.weight)
    plain.weight = nn.Parameter(leaf.weight.detach())
    assert torch.equal(plain.weight, mean(leaf))


@pytest.mark.parametrize("to", [torch.bfloat16, "meta"])
def test_it_follows_the_leaf(leaf: StochasticProjection, to: torch.dtype | str) -> None:
    before = leaf.weight
    leaf.to(to)
    found = leaf.weight
    assert (found.dtype, found.device) == (leaf.direction.dtype, leaf.direction.device)
    assert (before.dtype, before.device.type) == (torch.float32, "cpu")
    assert isinstance(found, MeanWeight) and (found + 0).shape == (3, 7)
