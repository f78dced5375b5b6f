"""A run's model card: README.md beside its adapter and beside its mean, of what the record says.

The Hub's metadata on top, then what the run is, how it is loaded with and without scalabl, what is known of its
calibration, and how it was trained. A README.md that somebody else wrote stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from scalabl.core.console import visible
from scalabl.core.files import write_text
from scalabl.runs.directory import EMBEDDED, EMBEDDED_ENCODER
from scalabl.runs.record import CHOICES, HEAD, RunRecord
from scalabl.tuner.mean_adapter import MEAN_DIRECTORY

PICTURE = "reliability.svg"
_OURS = "<!-- Written by scalabl from the run's record. Delete this line to keep a card of your own. -->"
_BLANK = "# Model Card for Model ID"  # PEFT's, which nobody has filled in
_ON_HUB = {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct", EMBEDDED_ENCODER: "sentence-transformers/all-MiniLM-L6-v2"}
_SHOWN = 20  # labels that are written out
_PAPER = "ScalaBL (Samplawski et al., UAI 2025, [arXiv 2506.21408](https://arxiv.org/abs/2506.21408))"


def write_cards(directory: Path, record: RunRecord, *, pictured: str | None = None) -> None:
    """Write the card of a finished run and that of its mean, in the place of PEFT's blank ones and of older ones.

    Args:
        directory: the run's.
        record: its record.
        pictured: the rows whose reliability `PICTURE` beside the card shows; None leaves the picture out.
    """
    cards = ((directory, card(record, pictured=pictured)), (directory / MEAN_DIRECTORY, card(record, of_mean=True)))
    for place, text in cards:
        path = place / "README.md"
        before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if place.is_dir() and (not before or _OURS in before or _BLANK in before):
            write_text(path, text)


def shows_picture(directory: Path) -> bool:
    """Whether a run's card has the picture of its reliability: one that somebody else wrote has not."""
    return f"]({PICTURE})" in (directory / "README.md").read_text(encoding="utf-8", errors="replace")


def card(record: RunRecord, *, of_mean: bool = False, pictured: str | None = None) -> str:
    """The Markdown of a run's card.

    Args:
        record: of a finished run.
        of_mean: of the plain LoRA beside it, which any other tool loads.
        pictured: as in `write_cards`.
    """
    base = _ON_HUB.get(record.model, record.model)
    on_hub = not Path(base).is_absolute()
    head, bayesian = record.scoring.get("scoring") == HEAD, record.parameters.get("variational", 0) > 0
    of = base if on_hub else Path(base).name
    what = "a plain LoRA, the mean of a posterior" if of_mean else _kind(record, bayesian)
    parts = [
        _metadata(base if on_hub else None, "text-classification" if head else "text-generation", bayesian),
        _OURS,
        f"# {_plain(record.task['name'])}, by {_plain(of)}",
        f"This is {what}: an adapter of {_plain(of)}, {_fitted(record)} {record.rows['train']:,} rows of "
        f"{_plain(_rows_of(record))} (licence: {_plain(record.task['licence'])}).",
    ]
    if record.labels is not None:
        shown = ", ".join(f"`{_code(label)}`" for label in record.labels[:_SHOWN])
        rest = f" and {len(record.labels) - _SHOWN:,} more" if len(record.labels) > _SHOWN else ""
        parts.append(f"Its {len(record.labels):,} labels: {shown}{rest}.")
    parts += ["## Use", _use(record, of_mean, head, base if on_hub else "BASE")]
    if record.kind == CHOICES:
        parts += ["## Calibration", _calibration(record, of_mean)]
    if pictured is not None:
        shown = f"Accuracy against confidence on {_plain(pictured)}, in 15 bins with their 95 % intervals"
        parts += [f"![{shown}]({PICTURE})", f"{shown}; on the dashed line a confidence is true."]
    parts += ["## Training", _training(record)]
    if record.warnings:
        parts.append("\n".join(f"- {_plain(warning)}" for warning in record.warnings))
    return "\n\n".join(parts) + "\n"


def _rows_of(record: RunRecord) -> str:
    """What the rows are called; a file of this machine without the directories that nobody else has."""
    source = record.task["source"] or record.task["name"]
    return Path(source).name if Path(source).is_absolute() else source


def _metadata(base: str | None, task: str, bayesian: bool) -> str:
    lines = [f"base_model: {json.dumps(base)}"] if base else []
    tags = ["scalabl", "lora", *(["bayesian", "uncertainty-quantification"] if bayesian else [])]
    lines += ["library_name: peft", f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _kind(record: RunRecord, bayesian: bool) -> str:
    if record.bayesianized is not None:
        return f"a LoRA with a Gaussian on the r numbers between A and B of each layer, fitted afterwards; {_PAPER}"
    if record.method == "scalabl":
        return f"a LoRA with a Gaussian on the r numbers between A and B of each layer, {_PAPER}"
    return f"a LoRA trained by `{_code(record.method)}`{', with a posterior' if bayesian else ''}"


def _use(record: RunRecord, of_mean: bool, head: bool, base: str) -> str:
    if of_mean:
        kind = "AutoModelForSequenceClassification" if head else "AutoModelForCausalLM"
        sized = f", num_labels={len(record.labels)}" if head and record.labels is not None else ""
        lines = [
            f"from transformers import {kind}", "from peft import PeftModel", "",
            f'model = PeftModel.from_pretrained({kind}.from_pretrained("{_code(base)}"{sized}), "DIR")',
        ]  # fmt: skip
        before = "One answer, without the posterior and without the run's temperature:"
    elif record.kind == CHOICES:
        lines = [
            "import scalabl",
            "",
            'answer = scalabl.Classifier.from_pretrained("DIR")(texts)',
            "answer.label, answer.probs, answer.entropy, answer.epistemic",
        ]
        before = f"Averaged over the posterior{' and calibrated' if record.calibration else ''}:"
    else:
        lines = ['scalabl generate DIR --prompt "..." --samples 10']
        before = "Averaged over the posterior:"
    language = "bash" if lines[0].startswith("scalabl") else "python"
    return "\n".join([before, "", f"```{language}", *lines, "```"])


def _calibration(record: RunRecord, of_mean: bool) -> str:
    made = record.calibration
    if made is None:
        return "None: `scalabl calibrate DIR --data ROWS` fits it on labelled rows."
    kind = f"{made['samples']} particles" if made["predictive"] == "mc" else str(made["predictive"])
    rows = [
        ("held-out rows", f"{made['rows']:,}"),
        ("NLL in nats, as learnt", f"{made['nll']['before']:.4f}"),
        ("NLL in nats, calibrated", f"{made['nll']['after']:.4f}"),
        *([("of them right", f"{100 * made['accuracy']:.3g} %")] if made.get("accuracy") is not None else []),
        ("temperature", f"{made['temperatures'][made['predictive']]:.3g}"),
        ("posterior's standard deviations times", f"{made['scale']:.3g}"),
        ("predicted by", kind),
    ]
    table = "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])
    note = "\n\nThe mean alone has none of it." if of_mean else ""
    return f"Fitted on these rows, which therefore flatter it a little.\n\n{table}{note}"


def _fitted(record: RunRecord) -> str:
    """Of an adapter that was given, only what was done here is known."""
    return "trained on" if record.bayesianized is None else "whose posterior was fitted afterwards on"


def _training(record: RunRecord) -> str:
    recipe, parameters = record.recipe, record.parameters
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    facts = [
        f"{parameters.get('lora', 0):,} parameters of LoRA (r = {recipe['r']}, alpha = {recipe['lora_alpha']:g})"
        f", {parameters.get('variational', 0):,} variational",
        f"{recipe['steps']:,} steps of {recipe['batch_size'] * recipe['gradient_accumulation']:,} rows at a learning "
        f"rate of {recipe['learning_rate']:g}, seed {recipe['seed']}"
        if recipe["steps"]
        else "no steps here: the posterior is a Laplace approximation around a finished adapter",
        f"scored by {_plain(record.scoring_name)}{_prompt(record)}",
        f"scalabl {record.scalabl}, {versions}, on {_plain(record.device)}",
    ]
    return "\n".join(f"- {fact}" for fact in facts)


def _prompt(record: RunRecord) -> str:
    template = record.scoring.get("template")
    line = str(template).replace("\n", "\\n")
    return "" if template is None else f" behind the prompt `{_code(line)}`"


def _plain(text: str) -> str:
    """Text of others as Markdown that shows it, and nothing else, on one line."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|~&])", r"\\\1", _on_one_line(text))


def _code(text: str) -> str:
    """Text of others between backticks."""
    return _on_one_line(text).replace("`", "'")


def _on_one_line(text: str) -> str:
    return visible(" ".join(text.split()))
