"""What each of two processes under FSDP 2 does for test_sharded.py.

`main(OUTPUT, *ARGUMENTS)`: `scalabl ARGUMENTS...`, then `own_trainer` into OUTPUT, and an encoder with a classification
head into "head" beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from own_process import program
from tiny_base import adapted, tiny_base
from transformers import Trainer, TrainingArguments
from two_processes import head_settings_of

from scalabl import ELBOCallback
from scalabl.core import processes
from scalabl.training.run import train


def own_trainer(output: Path, batch_size: int) -> list[dict[str, float]]:
    """Four steps of language modelling with draws of s, saved by `save_model`; returns the log."""
    model = adapted(target_modules=["q_proj", "down_proj"]).train()
    tokens = torch.randint(3, 300, (16, 10), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(output.with_suffix(".trainer")),
        per_device_train_batch_size=batch_size,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
    )
    processes.let_cpus_shard()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ELBOCallback(16)])  # type: ignore[arg-type]
    assert trainer.is_fsdp_enabled == (processes.world_size() > 1)
    trainer.train()
    trainer.save_model(str(output))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main(output: Path, *arguments: object) -> None:
    tiny_base("llama", layers=3)  # the one of `adapted`: in a process group it would be saved by the main one alone
    try:
        program(*arguments)
    except SystemExit as ended:
        if ended.code:
            raise
    own_trainer(output, batch_size=2)
    train(head_settings_of(output.parent, batch_size=2, layers="all"), output.parent / "head")
    torch.distributed.barrier()  # the main process holds the store that the others still read
