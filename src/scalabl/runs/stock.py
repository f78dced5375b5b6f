"""An adapter that another trainer has saved, read as a run.

PEFT's `save_pretrained`, Transformers' Trainer and TRL leave no record. What one would say is in the adapter's own
files: its kind, its base model and, of a classification head, its size; the names of the head's labels, and whether a
row may have several, where a configuration beside it, or the base's own, says so. How a language model's rows are
scored no file says: it is asked. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, read_if_whole, sha256
from scalabl.core.locations import expanded
from scalabl.data.template import Template
from scalabl.runs.directory import adapter_config, as_recorded, find_base, saved_shapes
from scalabl.runs.record import CHOICES, CONFIG, HEAD, LANGUAGE, RECORD, SEVERAL_LABELS, RowCounts, RunRecord, TaskFacts
from scalabl.runs.settings import DEFAULTS, typed_setting

# the layer whose outputs are the labels, by the names that Transformers and PEFT's SEQ_CLS know
_OUTPUTS = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj)?\.weight$")
UNNAMED = re.compile(r"LABEL_\d+")  # what Transformers calls a label that nobody has named
OTHER_PROMPT = (
    "An adapter at chance on rows of its own was probably trained with another prompt: give its template with "
    '--template, as in "Tweet: {text}\\nSentiment:", or rows {"prompt", "completion"}.'
)
LONGEST = 4096  # tokens of a prompt, where nothing else is said
_OTHER_TASKS = ("TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")
METHOD_OF = {"LORA": "mle", "SCALABL": "scalabl", "SCALABL_BLOB": "blob"}


@dataclass(frozen=True)
class Asked:
    """How the rows of an adapter without a record are scored, as far as it was said; None: as `scoring_of` finds best.

    Attributes:
        labels: that rows share, of a head in the order of its outputs; None for questions with choices of their own.
        scoring: "letters" or "continuation".
        template: how a row becomes a prompt.
        chat: put prompts into the tokenizer's chat template.
        max_length: longest row in tokens.
    """

    labels: tuple[str, ...] | None = None
    scoring: str | None = None
    template: str | None = None
    chat: bool | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.scoring not in (None, "auto", "letters", "continuation"):
            raise UserError(f"scoring is {self.scoring!r}; it must be auto, letters or continuation.")
        if self.template is not None:
            Template(self.template)
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length is {self.max_length}; it must be at least 1.")

    def refuse(self, why: str, **own: Any) -> None:
        """Refuse what was said where the files say it.

        Args:
            why: the end of the sentence.
            own: what they say, by name; the same may be said again.

        Raises:
            UserError: something else was said.
        """
        for name, value in vars(self).items():
            if value is not None and value != own.get(name):
                raise UserError(f"{name} {why}; leave it out.")


def read_classifier(directory: Path, *, model: str | None = None, asked: Asked | None = None) -> RunRecord:
    """The record of a finished run that scores choices; of another adapter what its files say and what is asked.

    Args:
        directory: a run's, or an adapter's.
        model: the base model, if the adapter does not name it or it has moved.
        asked: what an adapter without a record lacks; None refuses a language model's.

    Raises:
        UserError: as `RunRecord.read_classifier`, and `find_record`; something was asked that the files say.
    """
    found = find_record(directory, model=model, labels=None if asked is None else asked.labels)
    if found is None and asked is not None and (directory / CONFIG).is_file():
        return _of_choices(directory, asked, model)
    if found is None:
        return RunRecord.read_classifier(directory)  # which says what is missing
    if asked is not None:
        own = {"labels": found.labels} if is_stock(found) else {**found.scoring, "labels": found.labels}
        kind = "is of a prompt, and a classification head has none" if is_stock(found) else "is the run's own"
        asked.refuse(kind, **own)
    return found


def read_generating(directory: Path, *, model: str | None = None) -> RunRecord:
    """The record of a finished run that writes text, or what the files of a language model's adapter say.

    Args:
        directory: a run's, or an adapter's.
        model: the base model, if the adapter does not name it or it has moved.

    Raises:
        UserError: as `RunRecord.read_generating`; the adapter is of no language model.
    """
    if (directory / RECORD).is_file() or not (directory / CONFIG).is_file():
        return RunRecord.read_generating(directory)
    config = adapter_config(directory, "PEFT's save_pretrained")
    if config.get("task_type") not in (None, "CAUSAL_LM") or has_head(config):
        raise UserError(f"{directory} was trained for {config.get('task_type')}, which writes no text.")
    return _made_of(directory, config, model, {"scoring": "text", "chat": False, "max_length": LONGEST}, kind=LANGUAGE)


def find_record(directory: Path, *, labels: Sequence[str] | None = None, model: str | None = None) -> RunRecord | None:
    """As `read_classifier`; None where there is no record and the adapter has no head.

    Args:
        directory: a run's, or an adapter's.
        labels: the labels of a head, in the order of its outputs, where no file says them.
        model: as there.

    Raises:
        UserError: the head's labels are not known or not as many as its outputs, the base model is not named, the files
            are altered; the adapter is of another task than labels or text.
    """
    if (directory / RECORD).is_file():
        return RunRecord.read_classifier(directory)
    config = read_if_whole(directory / CONFIG)
    if isinstance(config, dict) and config.get("task_type") in _OTHER_TASKS:
        raise UserError(
            f"{directory} was trained for {config['task_type']}, which gives a row no label; give an adapter of "
            "CAUSAL_LM or SEQ_CLS."
        )
    if not isinstance(config, dict) or not has_head(config):
        return None
    config = adapter_config(directory, "PEFT's save_pretrained")
    base = _base(directory, config, model)
    named, several = _labels(directory, base, labels), _several(directory, base)
    scoring = {"scoring": HEAD, "labels": list(named), "pairs": None} | (
        {} if several is None else {"several": several}
    )
    return _made_of(directory, config, model, scoring, named)


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's configuration is of a model with a classification head."""
    kind, mapped = config.get("task_type"), config.get("auto_mapping")
    named = str(mapped.get("base_model_class")) if isinstance(mapped, Mapping) else ""
    return kind == "SEQ_CLS" or (kind is None and named.endswith("ForSequenceClassification"))


def is_stock(record: RunRecord) -> bool:
    """Whether a record was made of an adapter's files: what it was trained on is not known."""
    return record.rows["train"] == 0


def _of_choices(directory: Path, asked: Asked, model: str | None) -> RunRecord:
    """The record of a language model's adapter whose rows are scored as was asked."""
    config = adapter_config(directory, "PEFT's save_pretrained")
    labels = None if asked.labels is None else list(asked.labels)
    scoring = {
        "scoring": asked.scoring or "auto", "labels": labels, "template": asked.template, "chat": bool(asked.chat),
        "max_length": asked.max_length or LONGEST,
    }  # fmt: skip
    return _made_of(directory, config, model, scoring, asked.labels)


def _base(directory: Path, config: Mapping[str, Any], model: str | None) -> str:
    named = model or config.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{directory / CONFIG} does not name the base model; give it with --model (model= in Python).")
    return str(named) if model else find_base(str(named), directory)


def _made_of(
    directory: Path,
    config: dict[str, Any],
    model: str | None,
    scoring: dict[str, Any],
    labels: Sequence[str] | None = None,
    kind: str = CHOICES,
) -> RunRecord:
    adapter = str(config.get("peft_type"))
    if adapter not in METHOD_OF:
        raise UserError(f"{directory} holds an adapter of type {adapter}; give a ScalaBL adapter or a plain LoRA.")
    named = _base(directory, config, model)
    own = {name: typed_setting(name, config[name]) for name in ("r", "lora_alpha")}
    targets = config.get("target_modules") or "all-linear"
    own["target_modules"] = targets if isinstance(targets, str) else ",".join(sorted(targets))
    facts = {"model": as_recorded(named), "method": METHOD_OF[adapter], "scoring": scoring["scoring"], "steps": 0}
    shared = None if labels is None else list(labels)
    return RunRecord(
        recipe=DEFAULTS | own | facts,
        status="finished",
        kind=kind,
        task=TaskFacts(name="rows that are not known", source="", licence="unknown", labels=shared),
        rows=RowCounts(train=0, validation=0),
        scoring=scoring,
        scoring_name=scoring["scoring"],
        base_fingerprint=config.get("base_fingerprint"),
        adapter_sha256=sha256(directory / ADAPTER),
    )


def _labels(directory: Path, base: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The labels in the order of the head's outputs: those given, those of the configuration beside the adapter, or of
    the base's own."""
    number = _outputs(directory)
    known: tuple[str, ...] | None = None
    for place in (directory, expanded(base)):
        known = known or _named_labels(place / "config.json", number)
    found = known if given is None else tuple(given)
    if found is None:
        raise UserError(
            f"{directory} does not say what its labels are; pass labels=[...], or --labels, in the order of its head's "
            "outputs, or save the model's configuration there (model.config.save_pretrained)."
        )
    if number is not None and len(found) != number:
        raise UserError(f"The head of {directory} has {number} outputs, but there are {len(found)} labels; give each.")
    if len(set(found)) < len(found):
        raise UserError(f"Two labels of the head of {directory} have the same name; name each differently.")
    if known is not None and found != known and set(found) == set(known):
        raise UserError(f"labels are named in the order of the head's outputs, which is {', '.join(known)}.")
    return found


def _several(directory: Path, base: str) -> bool | None:
    """Whether a row may have several labels; None where no configuration says it."""
    for place in (directory, expanded(base)):
        config = read_if_whole(place / "config.json")
        if isinstance(config, dict) and config.get("problem_type") is not None:
            return bool(config["problem_type"] == SEVERAL_LABELS)
    return None


def _outputs(directory: Path) -> int | None:
    """How many outputs the head in an adapter's file has; None where it has no layer by a known name."""
    shapes = [shape for name, shape in saved_shapes(directory).items() if _OUTPUTS.search(name)]
    if shapes and shapes[0][0] == 1:
        raise UserError(f"The head of {directory} has one output, a regression's, which has no classes.")
    return shapes[0][0] if shapes else None


def _named_labels(path: Path, number: int | None) -> tuple[str, ...] | None:
    """The labels that a model's configuration names; None where it names none, or as many as the head has not."""
    config = read_if_whole(path)
    names = config.get("id2label") if isinstance(config, dict) else None
    if not isinstance(names, dict) or not names or len(names) != (number or len(names)):
        return None
    if config.get("problem_type") == "regression":
        raise UserError(f"{path} is of a regression, whose outputs are no labels.")
    try:
        found = tuple(str(names[str(i)]) for i in range(len(names)))
    except KeyError:
        raise UserError(f"{path} has an id2label that does not count from 0; restore the file.") from None
    return None if all(UNNAMED.fullmatch(name) for name in found) else found
