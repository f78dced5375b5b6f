"""The benchmark of richer distributions between A and B: its layers against known ones, its page on a tiny model."""

import json
from pathlib import Path

import pytest
import subspaces
import torch
import yaml
from subspaces import PRIOR_MEAN, VARIANTS, Between, Variant
from tiny_base import tiny_encoder, write_texts

from scalabl.posterior.gaussian import DiagonalGaussian, Prior

R = 4


def _between(kind: str, components: int = 1) -> Between:
    torch.manual_seed(0)
    return Between(torch.randn(R, 6), Variant(kind, components, signs=False))


def test_the_kl_is_that_of_the_library_and_a_mixture_s_the_mean_of_its_components() -> None:
    leaf, mixture = _between("diagonal"), _between("mixture", 3)
    prior = Prior(PRIOR_MEAN, leaf.variant.width)

    def known(mean: torch.Tensor) -> torch.Tensor:
        return DiagonalGaussian(mean.detach(), torch.full((R,), leaf.variant.width / 2)).kl(prior)

    torch.testing.assert_close(leaf.kl(), known(leaf.mean[0]))
    torch.testing.assert_close(mixture.kl(), torch.stack([known(mean) for mean in mixture.mean]).mean())


def test_without_noise_all_are_the_plain_layer() -> None:
    x, plain = torch.randn(3, 5, 6), _between("plain")
    for kind, shape in (("diagonal", (R,)), ("core", (R, R))):
        leaf = _between(kind)
        leaf.noise = torch.zeros(shape)
        torch.testing.assert_close(leaf(x), plain(x))
        leaf.noise = torch.ones(shape)
        assert not torch.allclose(leaf(x), plain(x))


def test_a_row_is_of_its_component() -> None:
    x, leaf = torch.randn(1, 5, 6).repeat(4, 1, 1), _between("mixture", 3)
    leaf.noise, leaf.rows_of = torch.zeros(R), torch.tensor([0, 2, 0, 1])
    out = leaf(x)
    torch.testing.assert_close(out[0], out[2])
    torch.testing.assert_close(out[1] / out[0], (leaf.mean[2] / leaf.mean[0]).expand_as(out[0]))
    assert not torch.allclose(out[1], out[3])


def test_every_variant_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_texts(tmp_path / "rows")
    study = {
        "model": str(tiny_encoder()), "tasks": [{"name": "few", "data": str(rows), "rows_per_class": 4}],
        "methods": ["scalabl"], "validation_rows": 9,
        "settings": {"steps": 3, "batch_size": 4, "r": R, "lora_alpha": 8, "layers": "last:2"},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path / "cache"))
    options = ["--study", str(tmp_path / "study.yaml"), "--tasks", "few", "--seeds", "0", "--samples", "4"]
    places = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["subspaces.py", *options, *places])
    subspaces.main()
    found = json.loads((tmp_path / "subspaces.json").read_text())["runs"]["few"]["0"]
    assert set(found) == {variant.name for variant in VARIANTS} | {"Laplace, r", "Laplace, r x r"}
    assert [name for name, of in found.items() if "test" in of] == ["plain", "Laplace, r", "Laplace, r x r", "diagonal"]
    page = (tmp_path / "subspaces.md").read_text()
    assert f"{found['core']['validation']['nll'] - found['plain']['validation']['nll']:+.3f}" in page
    monkeypatch.setattr(subspaces, "run", lambda *_: pytest.fail("it was measured before"))
    subspaces.main()
