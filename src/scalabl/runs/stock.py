"""An adapter with a classification head that another trainer has saved, read as a run.

PEFT's `save_pretrained` and Transformers' Trainer leave no record. What one would say is in the adapter's own files:
its kind, its base model and the head's size; the names of the head's labels, and whether a row may have several,
where a configuration beside it, or the base's own, says so. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, read_if_whole, sha256
from scalabl.core.locations import expanded
from scalabl.runs.directory import adapter_config, as_recorded, find_base, saved_shapes
from scalabl.runs.record import CONFIG, HEAD, RECORD, SEVERAL_LABELS, RowCounts, RunRecord, TaskFacts
from scalabl.runs.settings import DEFAULTS, typed_setting

# the layer whose outputs are the labels, by the names that Transformers and PEFT's SEQ_CLS know
_OUTPUTS = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj)?\.weight$")
UNNAMED = re.compile(r"LABEL_\d+")  # what Transformers calls a label that nobody has named
_OTHER_TASKS = ("TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")
_METHODS = {"LORA": "mle", "SCALABL": "scalabl", "SCALABL_BLOB": "blob"}


def read_classifier(directory: Path, *, model: str | None = None) -> RunRecord:
    """The record of a finished run that scores choices; what the files say of an adapter with a head and without one.

    Args:
        directory: a run's, or an adapter's.
        model: the base model, if the adapter does not name it or it has moved.

    Raises:
        UserError: as `RunRecord.read_classifier`, and `find_record`.
    """
    found = find_record(directory, model=model)
    return RunRecord.read_classifier(directory) if found is None else found  # which says what is missing


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
    return _record(directory, adapter_config(directory, "PEFT's save_pretrained"), labels, model)


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's configuration is of a model with a classification head."""
    kind, mapped = config.get("task_type"), config.get("auto_mapping")
    named = str(mapped.get("base_model_class")) if isinstance(mapped, Mapping) else ""
    return kind == "SEQ_CLS" or (kind is None and named.endswith("ForSequenceClassification"))


def is_stock(record: RunRecord) -> bool:
    """Whether a record was made of an adapter's files: what it was trained on is not known."""
    return record.rows["train"] == 0


def _record(directory: Path, config: dict[str, Any], labels: Sequence[str] | None, model: str | None) -> RunRecord:
    kind = str(config.get("peft_type"))
    if kind not in _METHODS:
        raise UserError(f"{directory} holds an adapter of type {kind}; give a ScalaBL adapter or a plain LoRA.")
    named = model or config.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{directory / CONFIG} does not name the base model; give it with --model (model= in Python).")
    named = str(named) if model else find_base(str(named), directory)
    own = {name: typed_setting(name, config[name]) for name in ("r", "lora_alpha")}
    targets = config.get("target_modules") or "all-linear"
    own["target_modules"] = targets if isinstance(targets, str) else ",".join(sorted(targets))
    found, several = _labels(directory, named, labels), _several(directory, named)
    method = _METHODS[kind]
    return RunRecord(
        recipe=DEFAULTS | own | {"model": as_recorded(named), "method": method, "scoring": HEAD, "steps": 0},
        status="finished",
        task=TaskFacts(name="rows that are not known", source="", licence="unknown", labels=list(found)),
        rows=RowCounts(train=0, validation=0),
        scoring={"scoring": HEAD, "labels": list(found), "pairs": None}
        | ({} if several is None else {"several": several}),
        scoring_name=HEAD,
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
