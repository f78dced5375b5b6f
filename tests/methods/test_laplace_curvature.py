"""Laplace-LoRA's curvature: Jacobians, Kronecker factors and logit covariances against dense autograd."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_base import loaded, questions
from torch import Tensor
from torch.func import functional_call

from scalabl.predictive.kronecker import Factor, KroneckerBlock, gauss_newton, jacobians, recorded
from scalabl.predictive.lora_particles import lora_matrices
from scalabl.scoring import Batch, Encoded, Scorer
from scalabl.scoring.likelihood import OneLabel
from scalabl.scoring.scorer import make_scoring

LETTERS = {"scoring": "letters", "num_letters": 4}
CONTINUATION = {"scoring": "continuation"}


def scorer(settings: dict[str, Any], targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Scorer:
    """A tiny model with a plain LoRA whose B is as if trained."""
    base, tokenizer = loaded(layers=2)
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.requires_grad_(False)
    return Scorer(model, make_scoring(settings, tokenizer))


def one_token(token: int, answer: int = 1) -> Encoded:
    return Encoded([token], [0], [0], 3, answer)


def class_logits(of: Scorer, batch: Batch) -> Tensor:
    with torch.no_grad():
        return of.class_logits(batch)


def dense_jacobian(of: Scorer, row: Encoded, name: str) -> Tensor:
    """(C, d_out, d_in) by reverse-mode autograd in one weight matrix alone."""
    batch = of.scoring.collate([row])
    module = lora_matrices(of.model)[name]
    path = next(path for path, m in of.model.named_modules() if m is module)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = of.model

        def forward(self) -> Tensor:
            return replace_inf(of.class_logits(batch)[0])

    def logits(weight: Tensor) -> Tensor:
        return functional_call(Logits(), {f"model.{path}.weight": weight}, ())

    return torch.autograd.functional.jacobian(logits, module.weight.detach())  # type: ignore[no-any-return]


def replace_inf(logits: Tensor) -> Tensor:
    return torch.where(logits.isfinite(), logits, 0.0)


def dense_curvature(of: Scorer, rows: list[Encoded], name: str) -> Tensor:
    """sum_n J_n^T (diag(p) - p p^T) J_n, with the weight matrix in row-major order."""
    total: Any = 0
    for row in rows:
        j = dense_jacobian(of, row, name).flatten(1)
        p = class_logits(of, of.scoring.collate([row]))[0].softmax(-1)
        total = total + j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
    return total  # type: ignore[no-any-return]


def dense(block: KroneckerBlock) -> Tensor:
    out = block.out_vectors @ torch.diag(block.out_values) @ block.out_vectors.T
    return torch.kron(out, block.in_vectors @ torch.diag(block.in_values) @ block.in_vectors.T)


@pytest.mark.parametrize("settings", [LETTERS, CONTINUATION], ids=["letters", "continuation"])
def test_jacobians_are_autograds_for_every_row_of_a_batch(settings: dict[str, Any]) -> None:
    of = scorer(settings)
    rows = [of.scoring.encode(row) for row in questions(4, choices=(3, 4))]
    batch = of.scoring.collate(rows)
    with torch.enable_grad(), recorded(of.model) as passed:
        found = jacobians(of.class_logits(batch), passed)
    assert set(found) == set(lora_matrices(of.model)) and len(found) == 8
    for name, j in found.items():
        for i, row in enumerate(rows):
            expected = dense_jacobian(of, row, name)
            torch.testing.assert_close(j[i, : len(expected)], expected, atol=1e-4, rtol=1e-3)
            assert not j[i, row.num_choices :].any()


def test_the_root_of_the_likelihoods_curvature() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, -torch.inf]])
    root = OneLabel().curvature_root(logits)
    for one, p in zip(root, logits.softmax(-1), strict=True):
        torch.testing.assert_close(one @ one.T, torch.diag(p) - torch.outer(p, p))


@pytest.mark.parametrize("copies", [1, 3])
def test_one_row_of_one_token_has_the_exact_gauss_newton_matrix(copies: int) -> None:
    """One token: every gradient is one outer product, and so is the Kronecker product; copies only add up."""
    of = scorer(LETTERS, ("v_proj", "o_proj"))
    rows = [one_token(40)] * copies
    curvature = gauss_newton(of, rows, rank=1024)
    for name, block in curvature.blocks.items():
        expected = dense_curvature(of, rows, name)
        assert expected.abs().max() > 1e-4, name
        torch.testing.assert_close(dense(block), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)
    log_probs = class_logits(of, of.scoring.collate(rows)).log_softmax(-1)
    assert curvature.log_likelihood == pytest.approx(log_probs[:, 1].sum().item(), rel=1e-5)


def test_several_rows_of_one_token_have_the_papers_factors() -> None:
    """(sum_n g g^T) (x) (1/N sum_n a a^T), with g and a taken from the dense Jacobians: its trace follows from them."""
    of = scorer(LETTERS, ("v_proj",))
    rows = [one_token(t) for t in (10, 40, 77)]
    curvature = gauss_newton(of, rows, rank=1024)
    batch = of.scoring.collate(rows)
    with torch.enable_grad(), recorded(of.model) as passed:
        of.class_logits(batch)
    for name, block in curvature.blocks.items():
        a = passed[name].inputs[:, 0]
        outer: Any = 0
        for i, row in enumerate(rows):
            p = class_logits(of, of.scoring.collate([row]))[0].softmax(-1)
            g = torch.einsum("coi,i->co", dense_jacobian(of, row, name), a[i]) / a[i].square().sum()
            outer = outer + g.T @ (torch.diag(p) - torch.outer(p, p)) @ g
        expected = torch.kron(outer, a.T @ a / 3)
        torch.testing.assert_close(dense(block), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)
        trace = outer.trace() * a.square().sum() / 3
        torch.testing.assert_close(block.eigenvalues.sum(), trace, rtol=1e-4, atol=1e-9)
        # the exact matrix has sum_n |g_n|^2 |a_n|^2: another number, since the factors are averaged apart
        assert dense_curvature(of, rows, name).trace() > 0


def test_padding_and_the_cut_of_batches_do_not_matter() -> None:
    of = scorer(CONTINUATION)
    embedding = of.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[of.scoring.tokenizer.pad_token_id] = embedding[5]  # as in models that pad with a real token
    rows = [of.scoring.encode(row) for row in questions(6)]
    assert len({len(row.input_ids) for row in rows}) > 2
    whole, cut = gauss_newton(of, rows, rank=1024, batch_size=6), gauss_newton(of, rows, rank=1024, batch_size=1)
    assert whole.log_likelihood == pytest.approx(cut.log_likelihood, rel=1e-5)
    for name, block in whole.blocks.items():
        one, other = dense(block), dense(cut.blocks[name])
        torch.testing.assert_close(one, other, atol=1e-4 * one.abs().max().item(), rtol=1e-3)


def test_the_model_is_left_as_it_was() -> None:
    of = scorer(LETTERS)
    gauss_newton(of, [one_token(40)], rank=8)
    assert not any(p.requires_grad for p in of.model.parameters())
    assert not any(m._forward_hooks for m in of.model.modules())


@pytest.mark.parametrize("ranks", [(4, 6), (2, 6), (4, 3), (1, 2)])
def test_a_logit_covariance_is_the_dense_formula(ranks: tuple[int, int]) -> None:
    """J (H + precision I)^-1 J^T, for exact factors and for those of a lower rank."""
    generator = torch.Generator().manual_seed(0)
    out_rank, in_rank = ranks
    block = KroneckerBlock(
        torch.linalg.qr(torch.randn(4, out_rank, generator=generator))[0],
        3 * torch.rand(out_rank, generator=generator),
        torch.linalg.qr(torch.randn(6, in_rank, generator=generator))[0],
        3 * torch.rand(in_rank, generator=generator),
    )
    j = torch.randn(2, 3, 4, 6, generator=generator)
    precisions = [0.7, 20.0]
    for precision, found in zip(precisions, block.logit_covariances(j, precisions), strict=True):
        inverse = torch.linalg.inv(dense(block) + precision * torch.eye(24))
        expected = j.flatten(2) @ inverse @ j.flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_factors_of_low_rank_are_exact_where_the_sum_is_of_that_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 3, generator=generator))[0]
    exact, low = Factor(12, 12, torch.device("cpu")), Factor(12, 3, torch.device("cpu"))
    for number in (1, 2, 5, 40):
        vectors = torch.randn(number, 3, generator=generator) @ basis.T
        exact.add(vectors)
        low.add(vectors)
    (whole, values), (part, kept) = exact.eigen(), low.eigen()
    assert part.shape == (12, 3)
    expected = whole @ torch.diag(values) @ whole.T
    torch.testing.assert_close(part @ torch.diag(kept) @ part.T, expected, atol=1e-3, rtol=1e-3)


def test_a_low_rank_factor_keeps_the_largest_directions() -> None:
    vectors = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 12)
    low = Factor(12, 4, torch.device("cpu"))
    low.add(vectors)
    values = low.eigen()[1].sort(descending=True).values
    torch.testing.assert_close(values, torch.linalg.svdvals(vectors)[:4].square(), rtol=1e-3, atol=1e-3)


def test_a_trunk_gives_the_same_curvature() -> None:
    from scalabl.scoring.trunk import Trunk

    of = scorer(CONTINUATION)
    for layer in (0,):  # adapters on the last layer alone
        for path, module in list(of.model.named_modules()):
            if path.endswith((f"layers.{layer}.self_attn.q_proj", f"layers.{layer}.self_attn.v_proj")):
                parent = of.model.get_submodule(path.rsplit(".", 1)[0])
                setattr(parent, path.rsplit(".", 1)[1], module.get_base_layer())  # type: ignore[operator]
    rows = [of.scoring.encode(row) for row in questions(3)]
    whole = gauss_newton(of, rows, rank=1024)
    of.trunk = Trunk(of.model)
    assert of.trunk.depth == 1
    encoded = of.with_trunk(of.scoring.collate(rows[:1])).trunk
    assert encoded is not None
    for some in (rows, [replace(rows[0], trunk=encoded[0]), *[with_trunk(of, row) for row in rows[1:]]]):
        again = gauss_newton(of, some, rank=1024)
        for name, block in whole.blocks.items():
            torch.testing.assert_close(
                dense(again.blocks[name]), dense(block), atol=1e-4 * dense(block).abs().max().item(), rtol=1e-3
            )


def with_trunk(of: Scorer, row: Encoded) -> Encoded:
    hidden = of.with_trunk(of.scoring.collate([row])).trunk
    assert hidden is not None
    return replace(row, trunk=hidden[0])
