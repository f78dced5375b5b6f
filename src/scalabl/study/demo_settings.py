"""The demo's recipe and its checks; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from scalabl.core.errors import UserError
from scalabl.runs.recipe import Recipe

TASK = "arc-easy"
TRAIN_ROWS = 600
VALIDATION_ROWS = 150
TEST_ROWS = 300
SHIFTED_ROWS = 100
STEPS = 150
SAMPLES = 10
LAYERS = "last:6"
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def demo_recipe(method: str, *, seed: int, steps: int) -> Recipe:
    """The same budget for both methods: rows, steps, batch, learning rate, targets, rank."""
    return Recipe(
        data=TASK,
        method=method,
        steps=steps,
        seed=seed,
        train_rows=TRAIN_ROWS,
        validation_rows=VALIDATION_ROWS,
        layers=LAYERS,
        target_modules=TARGETS,
        # few steps: sigma needs a rate at which it can arrive, and B a head start before the KL counts in full
        variational_learning_rate=5e-2,
        schedule="warmup",
        kl_warmup=0.5,
        scoring="continuation",
        max_length=256,
    )


def check_demo(output: Path, *, steps: int, test_rows: int, samples: int) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UserError: a number below 1, or a place that cannot be written.
    """
    for name, value in (("--steps", steps), ("--test-rows", test_rows), ("--samples", samples)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if output.is_file():
        raise UserError(f"{output} is a file; choose another --output.")
