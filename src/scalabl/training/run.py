"""A training run from a recipe to a finished directory, resumable at every checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from scalabl import __version__
from scalabl.diagnostics import unconverged
from scalabl.errors import UserError
from scalabl.methods import load_method
from scalabl.models import load_base
from scalabl.run_directory import ADAPTER, RECORD, claim, finished_record, read_record, sha256, write_json
from scalabl.scoring import Encoded, Scorer, Scoring
from scalabl.tasks import Example, Task, holdout, load_task
from scalabl.training.choose_scoring import candidates, choose_scoring, describe
from scalabl.training.guard import NonFiniteError, NonFiniteGuard
from scalabl.training.progress import ProgressBar, StopOnInterrupt
from scalabl.training.recipe import Recipe
from scalabl.training.trainer import ChoiceTrainer
from scalabl.trunk import Trunk
from scalabl.trunk_store import with_stored_trunk
from scalabl.tuner.fingerprint import fingerprint

LOG = "training_log.json"


@dataclass(frozen=True)
class Rows:
    """The rows of a run: trained on, and held out for every choice that is made before the test."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]


class Interrupted(Exception):
    """The run was stopped by Ctrl-C; its checkpoint is kept."""


def train(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Train, and write a finished run directory; resumes what an earlier call left unfinished.

    Args:
        recipe: what to train.
        output: the run's directory.

    Returns:
        the run's record, as in its `scalabl.json`.

    Raises:
        UserError: bad data, model or settings; another run in `output`.
        Interrupted: Ctrl-C; the same call goes on from the checkpoint.
    """
    task = load_task(recipe.data)
    rows = select_rows(task, recipe)
    if claim(output, recipe.as_dict()):
        return finished_record(output)
    try:
        return _train(recipe, output, task, rows)
    except BaseException as error:
        # what failed before its first checkpoint leaves no trace, what failed later a run that can be resumed
        last = last_checkpoint(output)
        if last is None and not _is_finished(output):
            shutil.rmtree(output, ignore_errors=True)
        if isinstance(error, NonFiniteError):
            kept = f" and choose another --output ({last} is the last good checkpoint)" if last else ""
            raise UserError(f"{str(error).partition(';')[0]}; lower --learning-rate{kept}.") from error
        raise


def _is_finished(output: Path) -> bool:
    return (output / RECORD).exists() and read_record(output).get("status") == "finished"


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run; half-written ones (a kill or a full disk while saving) are removed."""
    checkpoints = output / "checkpoints"
    found = []
    for directory in checkpoints.glob("checkpoint-*"):
        try:
            # the trainer writes its state last
            json.loads((directory / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(directory, ignore_errors=True)
        else:
            found.append((int(directory.name.rpartition("-")[2]), directory))
    return max(found)[1] if found else None


def _train(recipe: Recipe, output: Path, task: Task, rows: Rows) -> dict[str, Any]:
    if recipe.optimizer not in list(OptimizerNames):
        raise UserError(f"optimizer is {recipe.optimizer!r}; it must be one of {', '.join(OptimizerNames)}.")
    model, tokenizer = load_base(recipe.model, dtype=recipe.dtype, bits=recipe.bits)
    options = candidates(recipe, tokenizer, (*rows.train, *rows.validation), task.labels)
    longest = max((options[-1].encode(row) for row in rows.train[:50]), key=lambda row: sum(map(bool, row.segments)))
    Scorer(model, options[-1]).check_packing(longest)

    method = load_method(recipe.method)
    set_seed(recipe.seed)
    adapted = get_peft_model(model, method.adapter_config(recipe, model))
    trunk = Trunk(adapted) if not recipe.gradient_checkpointing else None
    scoring, nll = choose_scoring(options, adapted, trunk, rows.validation)
    record: dict[str, Any] = {
        "scalabl": __version__,
        "status": "running",
        "recipe": recipe.as_dict(),
        "task": {"name": task.name, "source": task.source, "licence": task.licence, "labels": task.labels},
        "rows": {"train": len(rows.train), "validation": len(rows.validation)},
        "scoring": scoring.settings(),
        "scoring_nll": nll,
        "parameters": count_parameters(adapted),
        "base_fingerprint": fingerprint(model),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "device": str(next(adapted.parameters()).device),
    }
    write_json(output / RECORD, record)
    encoded = with_stored_trunk(Scorer(adapted, scoring, trunk), [scoring.encode(row) for row in rows.train])
    log = optimise(recipe, output, adapted, scoring, trunk, encoded)

    _publish(adapted, output)
    write_json(output / LOG, log)
    record |= {
        "status": "finished",
        "adapter_sha256": sha256(output / ADAPTER),
        "scoring_name": describe(scoring),
        "warnings": unconverged(log),
    }
    write_json(output / RECORD, record)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return record


def select_rows(task: Task, recipe: Recipe) -> Rows:
    """Training and validation rows: the task's own, or a tenth of training rows held out.

    Which rows are taken depends on the recipe's sizes, never on its seed: seeds share their data.
    """
    train_rows = task.split("train")
    if "validation" in task.splits:
        validation = task.split("validation")
    else:
        train_rows, validation = holdout(train_rows, fraction=0.1, seed=0)
    return Rows(_subset(train_rows, recipe.train_rows), _subset(validation, recipe.validation_rows))


def _subset(rows: Sequence[Example], number: int | None) -> tuple[Example, ...]:
    if number is None or number >= len(rows):
        return tuple(rows)
    return tuple(random.Random(0).sample(list(rows), number))


def optimise(
    recipe: Recipe, output: Path, model: PeftModel, scoring: Scoring, trunk: Trunk | None, rows: list[Encoded]
) -> list[dict[str, float]]:
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        warmup_steps=int(recipe.warmup * recipe.steps),
        lr_scheduler_type="linear",
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        adam_epsilon=1e-6,
        optim=recipe.optimizer,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=max(1, min(10, recipe.steps // 10)),
        logging_nan_inf_filter=False,
        dataloader_drop_last=len(rows) >= recipe.batch_size,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        bf16=recipe.dtype == "bfloat16" and torch.cuda.is_available(),
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    bar, interrupt = ProgressBar(f"training {recipe.method}"), StopOnInterrupt()
    method: Any = load_method(recipe.method)
    trainer_class = method.trainer_class(ChoiceTrainer) if hasattr(method, "trainer_class") else ChoiceTrainer
    trainer = trainer_class(
        model,
        arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        callbacks=[*method.callbacks(recipe, len(rows)), NonFiniteGuard(), bar, interrupt],
        scoring=scoring,
        trunk=trunk,
    )
    trainer.remove_callback(PrinterCallback)
    last = last_checkpoint(output)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        bar.close()
        interrupt.restore()
    if interrupt.interrupted and trainer.state.global_step < recipe.steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {recipe.steps}")
    return [{k: v for k, v in entry.items() if isinstance(v, int | float)} for entry in trainer.state.log_history]


def _publish(model: PeftModel, output: Path) -> None:
    """Save beside, then move into place: a reader never meets half an adapter."""
    unfinished = output / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished))
    for item in unfinished.iterdir():
        target = output / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    unfinished.rmdir()


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Parameters: base, LoRA (A and B), variational (means and standard deviations of s, a rival's scales)."""
    own = (".posterior.", "_sampler.")
    variational = sum(p.numel() for n, p in model.named_parameters() if any(part in n for part in own))
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    total = sum(p.numel() for p in model.parameters())
    return {"base": total - adapter, "lora": adapter - variational, "variational": variational}
