"""What the demos train on and are tested on: a real model and real rows, in and out of scope. Imports no torch.

mmlu-subjects    an encoder routes questions to one of 20 subjects, and meets questions of 10 others
arc-easy         a language model answers science questions, and meets harder ones
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.runs.registry import BASELINE
from scalabl.runs.settings import Settings

SAMPLES = 10


@dataclass(frozen=True)
class Demo:
    """What a demo trains on and what it is tested on.

    Attributes:
        shifted: the rows out of scope.
        steps, test_rows, shifted_rows: at most.
        methods: which are trained; the first is what the others are compared with.
        settings: of every training, by their names.
    """

    shifted: str
    steps: int
    test_rows: int
    shifted_rows: int
    methods: tuple[str, ...]
    settings: dict[str, Any]


ROUTING, LANGUAGE = "mmlu-subjects", "arc-easy"
DEMOS = {
    ROUTING: Demo(
        shifted="mmlu-other-subjects",
        steps=200,
        test_rows=800,
        shifted_rows=400,
        methods=(BASELINE, "mc_dropout", Settings.method),
        settings={
            "model": "minilm-l6",
            "batch_size": 8,
            "learning_rate": 2e-3,  # what the study's validation rows take for this encoder, whatever the method
            "layers": "last:3",
            "max_length": 128,
        },
    ),
    LANGUAGE: Demo(
        shifted="mmlu-chemistry",
        steps=150,
        test_rows=300,
        shifted_rows=100,
        methods=(BASELINE, Settings.method),
        settings={
            "train_rows": 600,
            "validation_rows": 150,
            "layers": "last:6",
            "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
            # few steps: sigma needs a rate at which it can arrive, and B a head start before the KL counts in full
            "variational_learning_rate": 5e-2,
            "prior_mean": 0.0,
            "prior_std": 1.0,
            "init_sigma": 0.05,
            "schedule": "warmup",
            "kl_warmup": 0.5,
            "scoring": "continuation",
            "max_length": 256,
        },
    ),
}


def demo_settings(task: str, method: str, *, seed: int, steps: int) -> Settings:
    """The same budget for every method: rows, steps, batch, learning rate, targets, rank."""
    dropout = {"lora_dropout": 0.1} if method == "mc_dropout" else {}
    return Settings.flat(data=task, method=method, steps=steps, seed=seed, **DEMOS[task].settings, **dropout)


def check_demo(task: str, output: Path, *, steps: int | None, test_rows: int | None, samples: int) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UserError: no such demo, a number below 1, or a place that cannot be written.
    """
    if task not in DEMOS:
        raise UserError(f"There is no demo {task!r}; choose one of {', '.join(DEMOS)}.")
    for name, value in (("--steps", steps), ("--test-rows", test_rows), ("--samples", samples)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if output.is_file():
        raise UserError(f"{output} is a file; choose another --output.")
