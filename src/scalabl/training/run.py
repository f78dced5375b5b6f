"""A training run from settings to a finished directory, resumable at every checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from scalabl.core import processes
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, LOG, read_if_whole, sha256, write_json, writing
from scalabl.data.assemble import TrainingRows, repeated, select_rows
from scalabl.data.class_balance import balance_warnings, label_counts
from scalabl.data.example import Example, Task, rows_digest
from scalabl.data.load import load_training_task
from scalabl.data.text_rows import TextTask
from scalabl.runs.card import write_cards
from scalabl.runs.directory import EMBEDDED, as_recorded, begin, claim, posterior_warnings
from scalabl.runs.method import Run, TrainedMethod, load_method
from scalabl.runs.models import embedded_directory, load_base, load_tokenizer
from scalabl.runs.record import CHOICES, LANGUAGE, RowCounts, RunRecord, TaskFacts, config_digest
from scalabl.runs.registry import METHODS
from scalabl.runs.settings import OptimisationSettings, Settings
from scalabl.scoring.base import Encoded, Scoring, cut_rows_sentence
from scalabl.scoring.prompted import Prompted
from scalabl.scoring.read_token import known_first_token, remember_first_token
from scalabl.scoring.reading import remember_reading
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.training.checkpoints import DIRECTORY, Digests, last_checkpoint, remove_checkpoints, remove_traces
from scalabl.training.choose_scoring import candidates, check_rows, choose_scoring, describe, has_several, takes_head
from scalabl.training.features import fit_distance, write_features
from scalabl.training.monitors import NonFiniteError, NonFiniteGuard, ProgressBar, StopOnInterrupt, finite
from scalabl.training.ranks import (
    SeparateNoise,
    check_launch,
    fit_checkpoint,
    has_dropout,
    require_rows,
    shard_by_layers,
)
from scalabl.training.refusals import require_optimizer
from scalabl.training.trainer import token_counts, trainer_of, weighing_the_kl, whole_adapter
from scalabl.tuner.model import fingerprint

# a run that can predict, and its held-out rows -> its record's calibration; None where it cannot be fitted
Calibrating = Callable[[Run, Sequence[Example]], dict[str, Any] | None]


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; its checkpoint is kept."""


def train(
    settings: Settings,
    output: Path,
    *,
    task: Task | TextTask | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibrate: Calibrating | None = None,
    tell: Callable[[str], None] | None = None,
) -> RunRecord:
    """Train, and write a finished run directory; resumes what an earlier call left unfinished.

    In several processes (`scalabl.core.processes`) the main one chooses and writes; all of them get the record.

    Args:
        settings: what to train.
        output: the run's directory.
        task, tokenizer: the settings' own, where they are loaded already.
        calibrate: fits the run's calibration on its held-out rows, before it is finished; None leaves it uncalibrated.
        tell: called, in the main process, with lines on how rows are put to the model, before the training.

    Returns:
        the run's record, as in its `scalabl.json`.

    Raises:
        UserError: bad data, model or settings; another run in `output`.
        Interrupted: Ctrl-C; the same call goes on from the checkpoint.
    """
    task = task or load_training_task(settings.data)
    check_rows(settings, task)
    rows: TrainingRows[Any] = select_rows(task, settings.rows)
    check_launch(settings)
    require_rows(settings, len(rows.train))
    if processes.on_main(lambda: claim(output, settings, processes.world_size())):
        return RunRecord.of_main(lambda: RunRecord.read_finished(output))
    try:
        with processes.cleaning_up(lambda: remove_traces(output)):
            return _train(settings, output, task, rows, tokenizer, calibrate, tell)
    except NonFiniteError as error:
        last = last_checkpoint(output) if processes.is_main() else None
        kept = f" and choose another --output ({last} is the last good checkpoint)" if last else ""
        raise UserError(f"{str(error).partition(';')[0]}; lower --learning-rate{kept}.") from error


def read_log(directory: Path) -> list[dict[str, Any]]:
    """What the trainer of a run logged, in order.

    Raises:
        UserError: the run has no readable log.
    """
    log = read_if_whole(directory / LOG)
    if not isinstance(log, list):
        raise UserError(f"{directory} holds no readable {LOG}; delete the run and train it again.")
    return log


def _train(
    settings: Settings,
    output: Path,
    task: Task | TextTask,
    rows: TrainingRows[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    calibrate: Calibrating | None,
    tell: Callable[[str], None] | None,
) -> RunRecord:
    if settings.optimisation.optimizer != OptimisationSettings.optimizer:
        require_optimizer(settings.optimisation.optimizer, "cuda" if torch.cuda.is_available() else "cpu")
    processes.connect()
    if settings.model == EMBEDDED:
        processes.first_on_each_machine(embedded_directory)
    tokenizer = tokenizer or load_tokenizer(settings.model)
    head = takes_head(settings, task, tokenizer)
    set_seed(settings.seed)  # a new head is drawn
    of_head = {"labels": task.labels, "several": has_several(task)} if head else {}
    of_base = _placed(settings.machine.of_base) | of_head
    model, tokenizer = load_base(settings.model, **of_base, tokenizer=tokenizer)
    labels = task.labels
    balance = None if labels is None else label_counts(rows.train, labels)
    both = (*rows.train, *rows.validation)
    options = candidates(settings, tokenizer, both, labels, head=head, counts=balance)
    longest = max((options[-1].encode(row) for row in rows.train[:50]), key=lambda row: sum(map(bool, row.segments)))
    processes.on_main(lambda: Scorer(model, options[-1]).check_packing(longest))

    method = load_method(settings.method)
    set_seed(settings.seed)
    adapted = get_peft_model(model, method.adapter_config(settings, model))
    trunk = Trunk(adapted) if not settings.optimisation.gradient_checkpointing else None

    def choose() -> tuple[int, dict[str, float]]:
        best, nll = choose_scoring(options, adapted, trunk, rows.validation)
        return options.index(best), nll

    chosen, nll = processes.on_main(choose)
    scoring = options[chosen]
    if processes.is_main():
        tell_prompt(scoring, rows.train[0], tell)
    counts = RowCounts(train=len(rows.train), validation=len(rows.validation))
    record = record_of(settings, task, task.labels, counts, scoring, nll, adapted, fingerprint(model))
    held_out = None if isinstance(task, TextTask) else rows_digest(rows.validation)
    record = replace(record, class_counts=balance, held_out_sha256=held_out, trained_sha256=rows_digest(rows.train))
    processes.on_main(lambda: begin(output, record, goes_on=last_checkpoint(output) is not None))
    if not output.is_dir():
        raise UserError(f"{output} is not seen by every machine; give a directory on a file system that they share.")
    rows_of_run = [scoring.encode(row) for row in rows.train]
    thin = [] if isinstance(task, TextTask) else row_warnings(rows_of_run, scoring, rows.train, rows.validation)
    if head and labels is not None and balance is not None:
        thin += balance_warnings(balance, label_counts(rows.validation, labels))
    if isinstance(task, TextTask):
        record = replace(record, tokens=token_counts(rows_of_run))
    encoded = processes.first_on_each_machine(lambda: with_stored_trunk(Scorer(adapted, scoring, trunk), rows_of_run))
    log, beside = optimise(settings, output, adapted, scoring, trunk, encoded)

    distance = None if processes.is_sharded() else fit_distance(Scorer(adapted, scoring, trunk), encoded)
    tensors = whole_adapter(adapted)

    def publish() -> RunRecord:
        _publish(adapted, output, tensors)
        write_json(output / LOG, finite(log))
        digest = sha256(output / ADAPTER)
        if beside:
            with writing(output / f"{settings.method}.safetensors") as unfinished:
                save_file(beside, unfinished, metadata={"adapter_sha256": digest})
        trained = replace(
            record, adapter_sha256=digest, config_sha256=config_digest(output),
            features_sha256=write_features(output, distance), warnings=thin,
        )  # fmt: skip
        if not METHODS[settings.method].over_s:  # the sentences are of s
            return trained
        return replace(trained, warnings=posterior_warnings(output, trained))

    published = RunRecord.of_main(publish)
    calibration = None
    if calibrate is not None and not isinstance(task, TextTask) and not processes.is_sharded():  # a shard predicts not
        run = Run(published, Scorer(adapted, scoring, Trunk(adapted)), tokenizer, output)
        calibration = calibrate(run, rows.validation)

    def finish() -> RunRecord:
        finished = replace(published, status="finished", calibration=calibration)
        write_cards(output, finished)
        finished.write(output)
        remove_checkpoints(output)
        return finished

    return RunRecord.of_main(finish)


def tell_prompt(scoring: Scoring, row: Any, tell: Callable[[str], None] | None) -> None:
    """Tell how a template makes a prompt of a row, where one does."""
    if tell is not None and isinstance(scoring, Prompted):
        for line in scoring.in_words(row):
            tell(line)


def row_warnings(
    encoded: Sequence[Encoded], scoring: Scoring, rows: Sequence[Example], held_out: Sequence[Example]
) -> list[str]:
    """What a run's record says of its rows: that some lost their beginning, that held-out ones were trained on."""
    cut = cut_rows_sentence(encoded, scoring, "training rows")
    found = [] if cut is None else [cut]
    if again := repeated(held_out, rows):
        found.append(
            f"{len(again):,} of the {len(held_out):,} held-out rows stand among the training rows too ({again[0].id} "
            "the first of them), so that what is fitted on held-out rows trusts the run too far; take them out of one "
            "of the two."
        )
    return found


def record_of(
    settings: Settings,
    task: Task | TextTask,
    labels: Sequence[str] | None,
    rows: RowCounts,
    scoring: Scoring,
    nll: dict[str, float],
    model: PeftModel,
    base_fingerprint: Any,
) -> RunRecord:
    """What is known of a run before its weights are fitted."""
    return RunRecord(
        recipe=settings.as_dict() | {"model": as_recorded(settings.model)},
        kind=LANGUAGE if isinstance(task, TextTask) else CHOICES,
        task=TaskFacts(
            name=task.name, source=task.source, licence=task.licence, labels=None if labels is None else list(labels)
        ),
        rows=rows,
        scoring=scoring.settings(),
        scoring_name=describe(scoring),
        scoring_nll=nll,
        parameters=count_parameters(model, load_method(settings.method)),
        base_fingerprint=base_fingerprint,
        versions={name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        device=str(next(model.parameters()).device),
        processes=processes.world_size(),
    )


def _placed(options: dict[str, Any]) -> dict[str, Any]:
    """Where this process of several loads the base: on its own device; on the CPU, where it is to be sharded."""
    if processes.world_size() == 1:
        return options
    device = processes.own_device()
    if processes.is_sharded():
        if options["dtype"] == "auto":
            options = options | {"dtype": "float32" if device == "cpu" else "bfloat16"}
        device = "cpu"
    return options | {"device": device}


def optimise(
    settings: Settings, output: Path, model: PeftModel, scoring: Scoring, trunk: Trunk | None, rows: list[Encoded]
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train, from the last checkpoint if there is one: the log, and what the method leaves beside the adapter."""
    # tried once, of the longest row, while the model is whole
    packed, length, first_token = processes.on_main(lambda: _reading(Scorer(model, scoring), rows))
    remember_reading(model, packed, length)
    remember_first_token(model, first_token)
    arguments = TrainingArguments(
        output_dir=str(output / DIRECTORY),
        max_steps=settings.optimisation.steps,
        per_device_train_batch_size=settings.optimisation.batch_size,
        gradient_accumulation_steps=settings.optimisation.gradient_accumulation,
        learning_rate=settings.optimisation.learning_rate,
        warmup_steps=int(settings.optimisation.warmup * settings.optimisation.steps),
        lr_scheduler_type="linear",
        weight_decay=settings.optimisation.weight_decay,
        max_grad_norm=settings.optimisation.max_grad_norm,
        adam_epsilon=1e-6,
        optim=settings.optimisation.optimizer,
        gradient_checkpointing=settings.optimisation.gradient_checkpointing,
        seed=settings.seed,
        data_seed=settings.seed,
        save_steps=settings.machine.save_steps,
        save_total_limit=2,
        logging_steps=max(1, min(10, settings.optimisation.steps // 10)),
        logging_nan_inf_filter=False,
        dataloader_drop_last=len(rows) >= settings.optimisation.batch_size,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        # autocast of a sharded model would round s
        bf16=settings.machine.dtype == "bfloat16" and torch.cuda.is_available() and not processes.is_sharded(),
        use_cpu=not _on_accelerator(model),
    )
    _ = arguments.device  # which counts the cards
    arguments._n_gpu = 1  # one process trains on one: `nn.DataParallel` would cut a batch, hooks and all
    bar, interrupt = ProgressBar(f"training {settings.method}"), StopOnInterrupt()
    shown = [bar] if processes.is_main() else []
    method, weighing = load_method(settings.method), weighing_the_kl(settings, rows)
    of_method = method.callbacks(weighing, len(rows))
    processes.let_cpus_shard()
    trainer_class: Any = method.trainer_class(trainer_of(scoring))
    trainer = trainer_class(
        model,
        arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        callbacks=[*_of_ranks(method), *of_method, NonFiniteGuard(), *shown, interrupt, Digests()],
        optimizers=(method.optimizer(weighing, model, len(rows)), None),
        scoring=scoring,
        trunk=trunk,
    )
    if trainer.is_fsdp_enabled != processes.is_sharded():
        raise UserError("FSDP was asked for, but Accelerate does not shard on this machine; launch with ddp.yaml.")
    if trainer.is_fsdp_enabled:
        shard_by_layers(trainer.accelerator.state.fsdp_plugin, model)
    trainer.remove_callback(PrinterCallback)
    last = processes.on_main(lambda: _checkpoint_to_resume(output, has_dropout(model), arguments.train_batch_size))
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        bar.close()
        interrupt.restore()
    if interrupt.interrupted and trainer.state.global_step < settings.optimisation.steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {settings.optimisation.steps}")
    log = [{k: v for k, v in entry.items() if isinstance(v, int | float)} for entry in trainer.state.log_history]
    return log, method.beside(trainer)


def _reading(scorer: Scorer, rows: list[Encoded]) -> tuple[bool, int, bool]:
    return scorer.reads_packed(rows), max(len(row.input_ids) for row in rows), known_first_token(scorer.model)


def _checkpoint_to_resume(output: Path, dropout: bool, batch_size: int) -> str | None:
    last = last_checkpoint(output)
    if last is not None:
        fit_checkpoint(last, dropout=dropout, batch_size=batch_size)
    return None if last is None else str(last)


def _on_accelerator(model: PeftModel) -> bool:
    """Whether the model is trained on one: it is there, or waits on the CPU to be sharded."""
    return next(model.parameters()).device.type != "cpu" or (processes.is_sharded() and torch.cuda.is_available())


def _of_ranks(method: TrainedMethod) -> list[TrainerCallback]:
    """What several processes need beside: variational methods see to their noise themselves."""
    return [SeparateNoise()] if processes.world_size() > 1 and not method.traits.variational else []


def _publish(model: PeftModel, output: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Save beside, then move into place: a reader never meets half an adapter.

    Args:
        model: what was trained.
        output: the run's directory.
        tensors: the weights, gathered; None where they are whole.
    """
    unfinished = output / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished), state_dict=tensors)
    for item in unfinished.iterdir():
        target = output / item.name
        if item.name == "README.md" and target.exists():  # perhaps the user's own
            item.unlink()
            continue
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    unfinished.rmdir()


def count_parameters(model: PeftModel, method: TrainedMethod) -> dict[str, int]:
    """Parameters: base, LoRA (A and B), variational (means and standard deviations of s, another method's scales), and
    the head's where there is one."""
    lora, variational = method.count(model)
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    head = sum(p.numel() for n, p in model.named_parameters() if ".modules_to_save." in n)
    total = model.get_nb_trainable_parameters()[1]  # two 4-bit weights are one number of their tensor
    counts = {"base": total - adapter - head, "lora": lora, "variational": variational}
    return counts | ({"head": head} if head else {})
