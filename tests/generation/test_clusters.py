"""Which answers mean the same: matches, entailment both ways, and embeddings."""

import shutil
import types

import numpy as np
import pytest
import torch
from tiny_base import tiny_base, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from scalabl.core.errors import UserError
from scalabl.generation.equivalence import (
    EmbeddingSimilarity,
    Entailment,
    encoder,
    equivalence,
    semantic_sets,
    word_vectors,
)

TEXTS = ["Paris", " paris", "The Paris!", "Lyon", "Paris "]
NLI = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}


def as_sets(sets):
    """Which texts share a set, whatever its number."""
    return {frozenset(i for i, other in enumerate(sets) if other == number) for number in sets}


def test_matches():
    assert semantic_sets(TEXTS, equivalence("exact")) == [0, 1, 2, 3, 0]
    assert semantic_sets(TEXTS, equivalence("normalised")) == [0, 0, 0, 1, 0]
    assert semantic_sets([], equivalence("exact")) == []


@pytest.mark.parametrize("name", ["exact", "normalised"])
def test_matching_sets_do_not_depend_on_the_order(name):
    order = [3, 4, 0, 2, 1]
    found = as_sets(semantic_sets([TEXTS[i] for i in order], equivalence(name)))
    straight = as_sets(semantic_sets(TEXTS, equivalence(name)))
    assert {frozenset(order[i] for i in one) for one in found} == straight


def test_a_text_joins_the_first_set_whose_first_text_it_equals():
    """0 ~ 1 and 1 ~ 2 but not 0 ~ 2: of a chain, the third opens a set of its own."""
    chain = np.eye(3, dtype=bool)
    chain[0, 1] = chain[1, 0] = chain[1, 2] = chain[2, 1] = True
    assert semantic_sets(["a", "b", "c"], lambda texts, question="": chain) == [0, 0, 1]


def test_an_unknown_equivalence_is_refused():
    for name in ("synonyms", "entailment", "exact:x"):
        with pytest.raises(UserError, match="no equivalence of answers"):
            equivalence(name)


class Contains(torch.nn.Module):
    """A premise entails a hypothesis whose tokens it all has."""

    def __init__(self, labels=NLI):
        super().__init__()
        self.config = types.SimpleNamespace(id2label=labels)
        self.passes, self.size = 0, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, token_type_ids):
        self.passes += 1
        logits = torch.zeros(len(input_ids), 3)
        for row, (ids, mask, side) in enumerate(zip(input_ids, attention_mask, token_type_ids, strict=True)):
            premise, hypothesis = (set(ids[(mask == 1) & (side == which)].tolist()) for which in (0, 1))
            logits[row, 2 if hypothesis <= premise else 1] = 1
        return types.SimpleNamespace(logits=logits)


def pair_tokenizer():
    """The tiny tokenizer with a pair's second text marked as such."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_both_must_entail_each_other(batch_size):
    entailment = Entailment(Contains(), pair_tokenizer(), batch_size=batch_size)
    texts = ["abc", "ab", "cba", "abc", "ba"]
    expected = [[set(a) == set(b) for b in texts] for a in texts]
    assert entailment(texts).tolist() == expected
    assert semantic_sets(texts, entailment) == [0, 1, 0, 0, 1]


def test_the_question_is_part_of_what_is_compared():
    """Where the question holds all letters, every answer says the same."""
    entailment = Entailment(Contains(), pair_tokenizer())
    assert not entailment(["a", "b"]).all() and entailment(["a", "b"], "x a b").all()


def test_a_long_question_does_not_push_the_answers_out():
    tokenizer = pair_tokenizer()
    tokenizer.model_max_length = 16
    assert Entailment(Contains(), tokenizer)(["a", "b"], "x" * 60).tolist() == [[True, False], [False, True]]


def test_equal_texts_are_compared_once():
    model = Contains()
    assert Entailment(model, pair_tokenizer())(["a", "a", "a"]).all()
    assert model.passes == 0
    Entailment(model, pair_tokenizer(), batch_size=1)(["a", "b", "a", "b"])
    assert model.passes == 2


@pytest.fixture(scope="module")
def nli_directory(tmp_path_factory):
    """A tiny random model for natural language inference, with its tokenizer."""
    directory = tmp_path_factory.mktemp("nli")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(
        vocab_size=310, pad_token_id=0, id2label=NLI, label2id={v: k for k, v in NLI.items()}, num_labels=3, **sizes
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    model.save_pretrained(directory)
    pair_tokenizer().save_pretrained(directory)
    return directory


def test_a_model_from_a_directory_decides_as_its_labels_do(nli_directory):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["red", "blue stone", "a long answer", "red", "no"]
    found = equivalence(f"entailment:{nli_directory}")(texts, "why?")
    model = AutoModelForSequenceClassification.from_pretrained(nli_directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(nli_directory)

    def entails(a, b):
        with torch.no_grad():
            return int(model(**tokenizer(f"why? {a}", f"why? {b}", return_tensors="pt")).logits.argmax()) == 2

    expected = [[a == b or (entails(a, b) and entails(b, a)) for b in texts] for a in texts]
    assert found.tolist() == expected
    assert (found == found.T).all() and found.diagonal().all()


def test_a_tokenizer_that_lacks_characters_is_refused_before_any_answer(nli_directory, tmp_path):
    shutil.copytree(nli_directory, tmp_path / "nli")
    words = Tokenizer(models.WordPiece({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path / "nli")
    for name, kind in (("entailment", "entailment"), ("embedding", "embedding")):
        with pytest.raises(UserError, match=rf"The {kind} model .*nli cannot be loaded: .*\[UNK\]"):
            equivalence(f"{name}:{tmp_path / 'nli'}")


def test_models_that_infer_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="one label that begins with 'entail'"):
        Entailment(Contains({0: "positive", 1: "negative"}), None)
    Entailment(Contains({0: "entailment", 1: "not_entailment"}), None)
    for name in (f"entailment:{tmp_path}", f"embedding:{tmp_path}"):
        with pytest.raises(UserError, match="cannot be loaded"):
            equivalence(name)


def test_a_cosine_above_the_threshold():
    vectors = {"east": [1, 0], "north east": [2, 2], "north": [0, 3], "nowhere": [0, 0]}

    def embed(texts):
        return np.array([vectors[text] for text in texts], dtype=float)

    texts = ["East.", "north east", "North", "nowhere", "the east"]
    found = EmbeddingSimilarity(embed, 0.7)(texts)
    assert found.astype(int).tolist() == [
        [1, 1, 0, 0, 1], [1, 1, 1, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 1],
    ]  # fmt: skip
    assert not EmbeddingSimilarity(embed, 0.71)(texts)[0, 1]
    with pytest.raises(UserError, match="threshold"):
        EmbeddingSimilarity(embed, 2)


def test_the_vectors_of_the_package():
    same = equivalence("embedding")
    assert semantic_sets(["Paris", "It is Paris.", "London", "in London", "yes", "no", ""], same) == [
        0,
        0,
        1,
        1,
        2,
        3,
        4,
    ]
    # neighbours by their words, kept apart by their digits
    assert semantic_sets(["in 1912", "in 1913", "1912"], same) == [0, 1, 0]
    embed = word_vectors()
    one, two = embed(["paris", "stone"])
    assert one.shape == (256,) and np.isfinite(one).all()
    # tokens are averaged: " stone" stands behind as it stands in front
    both = embed(["paris stone"])[0]
    count = [len(text) for text in (["par", "is"], ["stone"])]
    np.testing.assert_allclose(both, (count[0] * one + count[1] * two) / sum(count), atol=1e-12)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps wordllama"):
        word_vectors()


def test_an_encoders_mean_does_not_see_padding():
    embed = encoder(str(tiny_base()))
    alone, together = embed(["red"]), embed(["red", "a long answer is wide open"])
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-4, atol=1e-4)
    assert embed([]).shape[0] == 0
    assert semantic_sets(["red", "Red!", "red"], equivalence(f"embedding:{tiny_base()}")) == [0, 0, 0]
