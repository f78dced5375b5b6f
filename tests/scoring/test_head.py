"""Classification heads on encoders and decoders: padding, trunk, particles, saving, the merged mean in a pipeline."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_bases import LABELS, MODELS, body_of
from peft import PeftModel, get_peft_model
from tiny_base import perturb, tiny_tokenizer
from tokenizers import normalizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    ConvBertConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.data.class_balance import class_weights
from scalabl.methods.plain import lora_options
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, predict
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Scorer
from scalabl.scoring.base import Scoring, cut_rows_sentence
from scalabl.scoring.continuation import Continuation
from scalabl.scoring.head import Head
from scalabl.scoring.letters import Letters
from scalabl.scoring.scorer import make_scoring
from scalabl.scoring.trunk import Trunk
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.training.trainer import ChoiceTrainer, WeightedTrainer, trainer_of, weighted_nll
from scalabl.tuner import ScalaBLConfig, stochastic_layers
from scalabl.tuner.layers import learnt_positions
from scalabl.tuner.mean_adapter import MEAN_DIRECTORY


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return body_of(request.param, tmp_path_factory.mktemp(request.param))


def scorer_of(base: Path, adapter: Path | None = None, layers: str = "last:2") -> Scorer:
    """The model with its head and adapter, new ones that are as if trained, or saved ones."""
    model, tokenizer = load_base(str(base), labels=LABELS)
    adapted: PeftModel
    if adapter is None:
        torch.manual_seed(1)
        adapted = get_peft_model(model, ScalaBLConfig(**lora_options(Settings.flat(layers=layers, r=4), model)))
        perturb(adapted)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name and "pooler" not in name and parameter.dim() > 1:
                    parameter.mul_(20)
    else:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    return Scorer(adapted.eval(), Head(tokenizer, labels=LABELS, max_length=100), Trunk(adapted))


def rows() -> list[Example]:
    texts = ("red", "a green answer that is long enough to be padded by others for sure", "blue or not?", "yes and no")
    return [Example(str(i), text, LABELS, i % 3) for i, text in enumerate(texts)]


def test_padding_trunk_and_particles_change_nothing(base: Path) -> None:
    scorer = scorer_of(base)
    assert scorer.trunk is not None and scorer.trunk.depth == 1
    encoded = [scorer.scoring.encode(row) for row in rows()]
    alone = predict(Scorer(scorer.model, scorer.scoring), encoded, MeanPredictive(), batch_size=1)
    assert alone.std(dim=1).max() > 0.01  # rows differ
    together = predict(scorer, encoded, MeanPredictive(), batch_size=4)
    stored = predict(scorer, with_stored_trunk(scorer, encoded, batch_size=3), MeanPredictive(), batch_size=4)
    assert (together - alone).abs().max() < 1e-4 and (stored - alone).abs().max() < 1e-4

    particles = predict(scorer, encoded, MonteCarloPredictive(6, seed=3), batch_size=4)
    by_one = predict(scorer, encoded, MonteCarloPredictive(6, seed=3), batch_size=1)
    assert (particles - by_one).abs().max() < 1e-4
    assert particles.std(dim=0).max() > 1e-3  # and particles do
    linearised = predict(scorer, encoded, LinearizedPredictive(), batch_size=4)
    assert linearised.shape[1:] == particles.shape[1:] and linearised.isfinite().all()


def test_a_head_that_padding_changes_is_refused_by_name() -> None:
    torch.manual_seed(0)
    of_layers: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = ConvBertConfig(
        vocab_size=310, embedding_size=32, num_attention_heads=4, head_ratio=2, num_labels=len(LABELS), **of_layers
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # what a token says reaches the logits
    scoring = Head(tiny_tokenizer(), labels=LABELS, max_length=100)
    scorer, encoded = Scorer(model, scoring), [scoring.encode(row) for row in rows()]
    with pytest.raises(UserError, match="A ConvBertForSequenceClassification reads a text otherwise where padding"):
        predict(scorer, encoded, MeanPredictive())
    assert predict(scorer, encoded[:1] * 3, MeanPredictive()).isfinite().all()  # of one length there is no padding


def test_it_is_saved_with_its_head_and_the_merged_mean_is_a_pipeline_of_its_labels(base: Path, tmp_path: Path) -> None:
    scorer = scorer_of(base)
    encoded = [scorer.scoring.encode(row) for row in rows()]
    expected = predict(scorer, encoded, MeanPredictive())[0]
    scorer.model.save_pretrained(tmp_path / "run")
    torch.manual_seed(99)  # the head of the base is drawn anew, and must not count
    found = predict(scorer_of(base, tmp_path / "run"), encoded, MeanPredictive())[0]
    assert (found - expected).abs().max() < 1e-5

    plain, tokenizer = load_base(str(base), labels=LABELS)
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "run" / MEAN_DIRECTORY)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    classify = pipeline("text-classification", str(tmp_path / "merged"), top_k=None)
    for row, log_probs in zip(rows(), expected, strict=True):
        scores = {each["label"]: each["score"] for each in classify([row.question])[0]}
        assert [scores[label] for label in LABELS] == pytest.approx(log_probs.exp().tolist(), abs=1e-4)


def test_a_row_of_other_choices_is_refused() -> None:
    head = Head(tiny_tokenizer(), labels=LABELS)
    with pytest.raises(UserError, match="has choices of its own"):
        head.encode(Example("q", "text", ("red", "blue"), 0))
    with pytest.raises(UserError, match="at least two labels"):
        Head(tiny_tokenizer(), labels=["red"])


PAIRS = (("red or blue", "a green one"), ("yes", "no, and a longer text than the first one " * 3), ("stone", "bee"))


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: a token between two texts and one behind them, and which text a token is of."""
    made = tiny_tokenizer()
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def test_pairs_are_read_as_transformers_reads_them(base: Path) -> None:
    tokenizer = pair_tokenizer()
    scorer = scorer_of(base)
    model = scorer.model
    scorer = Scorer(model, Head(tokenizer, labels=LABELS, max_length=60, pairs=True), scorer.trunk)
    assert scorer.trunk is not None and scorer.trunk.depth == 1
    encoded = [
        scorer.scoring.encode(Example(str(i), text, LABELS, 0, pair=pair)) for i, (text, pair) in enumerate(PAIRS)
    ]
    assert encoded[1].dropped > 0 and encoded[0].dropped == 0
    expected, accepts = [], inspect.signature(model.get_base_model().forward).parameters
    for text, pair in PAIRS:
        tokens = tokenizer(text, pair, truncation="longest_first", max_length=60, return_tensors="pt")
        read = {name: value for name, value in tokens.items() if name in accepts}
        with torch.no_grad():
            expected.append(model(**read).logits.log_softmax(dim=-1))
    together = predict(scorer, encoded, MeanPredictive(), batch_size=3)[0]
    stored = predict(scorer, with_stored_trunk(scorer, encoded, batch_size=3), MeanPredictive(), batch_size=3)[0]
    assert (together - torch.cat(expected)).abs().max() < 1e-4
    assert (stored - torch.cat(expected)).abs().max() < 1e-4
    if model.config.model_type == "bert":  # it does read which text a token is of
        blind = [replace(row, token_types=[0] * len(row.input_ids)) for row in encoded]
        assert (predict(scorer, blind, MeanPredictive())[0] - together).abs().max() > 1e-2


def test_rows_that_are_too_long_lose_their_end_and_are_counted() -> None:
    tokenizer = pair_tokenizer()
    row = Example("long", "red " * 40, LABELS, 0)
    whole, head = Head(tokenizer, labels=LABELS).encode(row), Head(tokenizer, labels=LABELS, max_length=20)
    cut = head.encode(row)
    assert cut.input_ids == [*whole.input_ids[:19], 2] and cut.dropped == len(whole.input_ids) - 20
    sentence = cut_rows_sentence([cut, whole], head)
    assert sentence is not None and f"read without their end; --max-length {len(whole.input_ids)}" in sentence
    tokenizer.truncation_side = "left"
    head = Head(tokenizer, labels=LABELS, max_length=20)
    assert head.encode(row).input_ids == [1, *whole.input_ids[-19:]]
    assert "without their beginning" in str(cut_rows_sentence([cut], head))


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        (Example("x", " \n", LABELS, 0), {}, "Row x has an empty text, of which no token is left; give it a text."),
        (Example("x", "\u200b", LABELS, 0), {}, "Row x has an empty text"),
        (Example("x", "red", LABELS, 0, pair=" "), {"pairs": True}, "Row x has an empty text"),
        (Example("x", "red", LABELS, 0), {"pairs": True}, 'Row x has no "text_pair", but the run was trained on pairs'),
        (Example("x", "red", LABELS, 0, pair="a"), {}, 'Row x has a "text_pair", but the run was trained on single'),
        (Example("x", "red yes no", LABELS, 0), {"max_length": 2}, "raise --max-length to 3 at least"),
    ],
)
def test_rows_that_a_head_cannot_read_are_refused(row: Example, options: dict[str, Any], said: str) -> None:
    tokenizer = pair_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(UserError, match=re.escape(said)):
        Head(tokenizer, labels=LABELS, **options).encode(row)


def test_a_head_that_does_not_know_whether_rows_are_pairs_reads_both() -> None:
    head = make_scoring(Head(pair_tokenizer(), labels=LABELS, pairs=None).settings(), pair_tokenizer())
    assert head.encode(Example("x", "red", LABELS, 0)).token_types is None
    types = head.encode(Example("x", "red", LABELS, 0, pair="blue")).token_types
    assert types is not None and types == sorted(types) and set(types) == {0, 1}
    assert "pairs" not in Head(pair_tokenizer(), labels=LABELS).settings()  # as older records
    single, pair = (head.encode(Example("x", "red", LABELS, 0, pair=other)) for other in (None, "blue"))
    assert pair.token_types is not None
    blank = [0] * len(pair.input_ids)
    for rows, expected in (((single, pair), [blank, pair.token_types]), ((pair, single), [pair.token_types, blank])):
        types = head.collate(rows).token_types
        assert types is not None and types.tolist() == expected
    assert head.collate([single]).token_types is None


@pytest.mark.parametrize("kind", [Letters, Continuation])
def test_pairs_and_several_labels_are_refused_where_no_head_reads_them(kind: type[Scoring]) -> None:
    with pytest.raises(UserError, match='Row x has a "text_pair", which only a classification head reads'):
        kind(tiny_tokenizer()).encode(Example("x", "red", ("yes", "no"), 0, pair="blue"))
    with pytest.raises(UserError, match='Row x has "labels", several or none, which only a classification head learns'):
        kind(tiny_tokenizer()).encode(Example("x", "red", ("yes", "no"), None, answers=(0, 1)))


@pytest.mark.parametrize(
    ("name", "room"), [("bert", 130), ("roberta", 129), ("mpnet", 128), ("deberta-v2", 130), ("modernbert", None)]
)
def test_a_longest_row_beyond_the_learnt_positions_is_refused(name: str, room: int | None) -> None:
    model = AutoModelForSequenceClassification.from_config(MODELS[name])
    assert learnt_positions(model) == room
    for length in (room or 9999, (room or 9999) + 1):
        scorer = Scorer(model, Head(tiny_tokenizer(), labels=LABELS, max_length=length))
        row = scorer.scoring.encode(Example("x", "red " * 200, LABELS, 0))
        if length == room or room is None:
            scorer.check_packing(row)
            assert room is None or scorer.class_log_probs(scorer.scoring.collate([row])).isfinite().all()
        else:
            with pytest.raises(UserError, match=f"this {name} has learnt positions for {room} tokens; give --max-l"):
                scorer.check_packing(row)


def test_weights_of_the_likelihood_are_taken_back_from_the_class_logits() -> None:
    weights = class_weights("balanced", {"red": 80, "blue": 15, "green": 5})
    head = Head(tiny_tokenizer(), labels=LABELS, class_weights=weights)
    head = make_scoring(json.loads(json.dumps(head.settings())), tiny_tokenizer())
    assert isinstance(head, Head) and trainer_of(head) is WeightedTrainer
    answers = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    batch = head.collate([head.encode(Example("x", "red", LABELS, 0))])
    logits = torch.zeros(1, 3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=0.5, max_iter=200)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        class_logits = head.class_logits(logits, batch).expand(len(answers), -1)
        loss = weighted_nll(class_logits, answers, head.weights(logits.device))
        loss.backward()
        return loss

    optimizer.step(step)  # one text whose labels are known in distribution
    learnt = logits.detach()
    assert learnt.softmax(dim=-1)[0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert head.class_logits(learnt, batch).softmax(dim=-1)[0].tolist() == pytest.approx([0.8, 0.15, 0.05], abs=1e-3)
    plain = F.cross_entropy(learnt.expand(100, -1), answers, weight=head.weights(logits.device), reduction="sum")
    assert step().item() == pytest.approx(plain.item() / 100, abs=1e-5)
    assert trainer_of(Head(tiny_tokenizer(), labels=LABELS)) is ChoiceTrainer


@pytest.mark.parametrize("named", ["pooler.dense", "classifier"])
def test_a_target_behind_the_layers_is_refused_by_name(named: str, tmp_path: Path) -> None:
    model, _ = load_base(str(body_of("bert", tmp_path)), labels=LABELS)
    with pytest.raises(UserError, match=f"target_modules names {named}, which stands in none of the model's layers"):
        lora_options(Settings.flat(target_modules=f"query,{named}"), model)


def test_an_adapter_on_a_pooler_is_plain_lora_and_one_on_what_is_trained_whole_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load_base(str(body_of("bert", tmp_path)), labels=LABELS)
    targets = ["query", "pooler.dense"]
    with pytest.raises(UserError, match="target_modules names classifier, which is trained whole"):
        get_peft_model(model, ScalaBLConfig(task_type="SEQ_CLS", target_modules=["query", "classifier"]))
    with pytest.raises(UserError, match="stochastic_modules names dense, which this model also applies to what is no"):
        get_peft_model(
            model, ScalaBLConfig(task_type="SEQ_CLS", target_modules=targets, stochastic_modules=["pooler.dense"])
        )
    for named in (targets, "all-linear"):
        adapted = get_peft_model(model, ScalaBLConfig(task_type="SEQ_CLS", r=4, target_modules=named))
        perturb(adapted)
        assert any("pooler.dense.lora_A" in name for name, _ in adapted.named_parameters())
        assert not any("pooler" in name for name in stochastic_layers(adapted))
        ids = tokenizer([row.question for row in rows()], padding=True, return_tensors="pt")
        loss = adapted.train()(**ids, labels=torch.tensor([0, 1, 2, 0])).loss
        loss.backward()
        assert all(leaf.posterior.log_std.grad is not None for leaf in stochastic_layers(adapted).values())
        adapted.unload()
    # the last layers are those that can have an s
    config = ScalaBLConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", stochastic_layers="last:2")
    layers = {name.partition("layer.")[2][:1] for name in stochastic_layers(get_peft_model(model, config))}
    assert layers == {"1", "2"}
