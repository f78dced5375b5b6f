"""The trunk: what is computed once below the lowest adapted layer changes no number."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from head_bases import LABELS, body_of
from peft import LoraConfig, get_peft_model
from tiny_base import ARCHITECTURES, adapted, loaded, perturb, questions, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import scalabl
from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.scoring import Batch, Continuation, Letters, Scorer
from scalabl.scoring.head import Head
from scalabl.scoring.trunk import Trunk
from scalabl.scoring.trunk_store import with_stored_trunk


def batch_of(number: int = 4) -> tuple[Continuation, Batch]:
    _, tokenizer = loaded()
    scoring = Continuation(tokenizer)
    return scoring, scoring.collate([scoring.encode(row) for row in questions(number)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("last", [1, 2])
def test_resuming_from_the_trunk_equals_the_full_pass(architecture: str, last: int) -> None:
    model = adapted(architecture, last=last)
    scoring, batch = batch_of()
    trunk = Trunk(model)
    assert trunk.depth == 3 - last
    whole, resumed = Scorer(model, scoring), Scorer(model, scoring, trunk)
    with torch.no_grad():
        cached = resumed.with_trunk(batch)
        assert cached.trunk is not None and cached.trunk.shape == (*batch.input_ids.shape, 32)
        torch.testing.assert_close(resumed.logits(cached), whole.logits(batch), atol=2e-5, rtol=1e-5)
        with scalabl.particles(model, 3):
            expected = whole.class_log_probs(batch.repeat(3))
            torch.testing.assert_close(resumed.class_log_probs(cached.repeat(3)), expected, atol=2e-5, rtol=1e-5)
    trunk.check(model, batch)


def test_the_layers_are_back_in_place_afterwards_even_after_an_error() -> None:
    model = adapted(last=1)
    scoring, batch = batch_of()
    before = [id(layer) for layer in model.get_base_model().model.layers]
    trunk = Trunk(model)
    hidden = trunk.encode(model, batch)
    with pytest.raises(ZeroDivisionError), trunk.resume(model, hidden):
        assert [id(layer) for layer in model.get_base_model().model.layers] != before
        raise ZeroDivisionError
    assert [id(layer) for layer in model.get_base_model().model.layers] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def gradients(scorer: Scorer, batch: Batch) -> dict[str, Tensor]:
    scorer.model.train()
    torch.manual_seed(5)  # the same draw of s in both passes
    loss = torch.nn.functional.cross_entropy(scorer.class_logits(batch), batch.answers)
    loss.backward()
    found = {n: p.grad.clone() for n, p in scorer.model.named_parameters() if p.grad is not None}
    scorer.model.zero_grad()
    scorer.model.eval()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_from_the_trunk_has_the_same_gradients(architecture: str) -> None:
    model = adapted(architecture, last=2)
    scoring, batch = batch_of()
    resumed = Scorer(model, scoring, Trunk(model))
    whole = gradients(Scorer(model, scoring), batch)
    cached = gradients(resumed, resumed.with_trunk(batch))
    assert whole.keys() == cached.keys() and len(whole) == 2 * 2 * 4
    for name, gradient in whole.items():
        torch.testing.assert_close(cached[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"target_modules": ["q_proj"]}, 0),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, 1),
        ({"target_modules": ["down_proj"], "layers_to_transform": [2]}, 2),
        ({"target_modules": ["lm_head"]}, 3),
        ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["embed_tokens", "q_proj"], "layers_to_transform": [2]}, 0),
    ],
)
def test_the_depth_is_that_of_the_lowest_adapted_layer(options: dict[str, object], depth: int) -> None:
    base, _ = loaded()
    if options.get("layers_to_transform") == [1] or "embed_tokens" in options["target_modules"]:  # type: ignore[operator]
        # layers_to_transform leaves out what is in no layer: name the modules by their paths instead
        layer = options.pop("layers_to_transform")[0]  # type: ignore[index]
        options["target_modules"] = [
            name if name in ("lm_head", "embed_tokens") else f"layers.{layer}.self_attn.{name}"
            for name in options["target_modules"]  # type: ignore[attr-defined]
        ]
    assert Trunk(get_peft_model(base, LoraConfig(r=2, **options))).depth == depth  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapted_output_layer_alone_resumes_from_the_last_layer(architecture: str) -> None:
    base, tokenizer = loaded(architecture)
    torch.manual_seed(1)
    model = get_peft_model(base, scalabl.ScalaBLConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")).eval()
    perturb(model)
    scoring = Letters(tokenizer, num_letters=5)
    batch = scoring.collate([scoring.encode(row) for row in questions(4)])
    scorer = Scorer(model, scoring, Trunk(model))
    with torch.no_grad():
        expected = Scorer(model, scoring).logits(batch)
        torch.testing.assert_close(scorer.logits(scorer.with_trunk(batch)), expected, atol=2e-5, rtol=1e-5)


def test_a_model_that_cannot_resume_is_refused() -> None:
    model = adapted(last=1)
    _, batch = batch_of()
    trunk = Trunk(model)
    encode = trunk.encode
    trunk.encode = lambda m, b, *start: encode(m, b, *start) * 1.5  # type: ignore[method-assign]
    with pytest.raises(UserError, match="cannot resume from a cached trunk"):
        trunk.check(model, batch)


def stored_files() -> list[str]:
    from scalabl.core.files import cache_directory

    return sorted(path.name for path in (cache_directory() / "trunks").glob("*"))


@pytest.mark.parametrize("change", ["nothing", "rows", "weights", "depth"])
def test_the_store_is_read_again_only_for_the_same_rows_weights_and_depth(
    change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path))
    scoring, _ = batch_of()
    rows = [scoring.encode(row) for row in questions(4)]

    def scorer(last: int) -> Scorer:
        model = adapted(last=last)
        return Scorer(model, scoring, Trunk(model))

    first = with_stored_trunk(scorer(1), rows)
    assert len(stored_files()) == 1
    other = scorer(2 if change == "depth" else 1)
    if change == "weights":
        with torch.no_grad():
            other.model.get_base_model().model.layers[0].mlp.up_proj.weight[3, 4] += 0.5
    if change == "rows":
        rows = [replace(rows[0], position_ids=[p + 1 for p in rows[0].position_ids]), *rows[1:]]
    second = with_stored_trunk(other, rows)
    assert len(stored_files()) == (1 if change == "nothing" else 2)
    same = all(torch.equal(a.trunk, b.trunk) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]
    assert same == (change == "nothing")


@pytest.mark.parametrize("change", ["nothing", "head", "positions", "norm", "pooler"])
def test_the_store_knows_a_model_by_all_that_its_trunk_reads(
    change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path / "cache"))
    body = body_of("bert", tmp_path / "body")

    def scorer(eps: float = 1e-12) -> Scorer:
        base = AutoModelForSequenceClassification.from_pretrained(body, num_labels=3, layer_norm_eps=eps)
        config = scalabl.ScalaBLConfig(r=2, target_modules=["query"], layers_to_transform=[2])
        model = get_peft_model(base, config)
        return Scorer(model.eval(), Head(tiny_tokenizer(), labels=LABELS, max_length=100), Trunk(model))

    first = scorer()
    rows = [first.scoring.encode(Example(str(i), text, LABELS, 0)) for i, text in enumerate(("red", "a blue bee"))]
    with_stored_trunk(first, rows)
    other = scorer(1e-3 if change == "norm" else 1e-12)
    inner = other.model.get_base_model()
    changed = {
        "head": inner.classifier,
        "positions": inner.bert.embeddings.position_embeddings,
        "pooler": inner.bert.pooler,
    }
    if change in changed:
        with torch.no_grad():
            next(changed[change].parameters())[0] += 0.5
    with_stored_trunk(other, rows)
    assert len(stored_files()) == (2 if change in ("positions", "norm") else 1)


def test_stored_rows_are_those_of_a_pass_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path))
    model = adapted(last=1)
    scoring, _ = batch_of()
    scorer = Scorer(model, scoring, Trunk(model))
    rows = [scoring.encode(row) for row in questions(7)]
    for _ in range(2):  # computed, then read
        for row, stored in zip(rows, with_stored_trunk(scorer, rows, batch_size=3), strict=True):
            alone = scorer.with_trunk(scoring.collate([row])).trunk
            assert alone is not None and stored.trunk is not None
            torch.testing.assert_close(stored.trunk, alone[0], atol=1e-5, rtol=1e-5)


def test_a_damaged_store_is_computed_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path))
    from scalabl.core.files import cache_directory

    model = adapted(last=1)
    scoring, _ = batch_of()
    rows = [scoring.encode(row) for row in questions(3)]
    first = with_stored_trunk(Scorer(model, scoring, Trunk(model)), rows)
    path = cache_directory() / "trunks" / stored_files()[0]
    path.write_bytes(path.read_bytes()[:-7])
    second = with_stored_trunk(Scorer(model, scoring, Trunk(model)), rows)
    assert all(torch.equal(a.trunk, b.trunk) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]
