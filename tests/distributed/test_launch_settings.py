"""What several processes share, and what a launcher's settings are refused for, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from head_bases import body_of, stock_head
from peft import get_peft_model
from tiny_base import adapted, loaded
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainingArguments
from two_processes import CONFIGS, settings_of

import scalabl
from scalabl.core import processes
from scalabl.core.errors import UserError
from scalabl.core.files import sha256, write_json
from scalabl.predictive.base import share
from scalabl.runs.directory import claim
from scalabl.training import ranks
from scalabl.training.ranks import check_launch, fit_checkpoint, has_dropout, require_rows, shard_by_layers
from scalabl.training.refusals import refuse_hidden_gradients
from scalabl.tuner import stochastic_layers


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 0 of two."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero3"])
def test_accelerate_reads_the_configurations(config: str) -> None:
    read: Any = load_config_from_file(str(CONFIGS / f"{config}.yaml"))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[config]
    assert read.distributed_type == DistributedType[expected] and read.num_processes == 2
    if config == "fsdp2":
        assert read.fsdp_config["fsdp_version"] == 2 and read.mixed_precision == "no"


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "first version": ({**FSDP, "FSDP_VERSION": "1"}, {}, "set fsdp_version to 2"),
    "mixed precision": ({**FSDP, "ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "would round the posterior"),
    "checkpointing": ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "draws other noise in the backward pass"),
    "empty bases": ({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading to false"),
    "4 bit": (FSDP, {"bits": 4}, "is not sharded"),
    "a rival": (FSDP, {"method": "blob"}, "blob was not tried with FSDP"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_fsdp_cannot_train_is_refused_before_any_work(case: str, two: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment, changes, words = REFUSED[case]
    two.setattr(ranks, "compare_versions", lambda *_: False)
    for name, value in environment.items():
        two.setenv(name, value)
    with pytest.raises(UserError, match=words):
        check_launch(settings_of(tmp_path, **changes))
    for name, value in {**FSDP, "ACCELERATE_MIXED_PRECISION": "no"}.items():
        two.setenv(name, value)
    for name in ("FSDP_ACTIVATION_CHECKPOINTING", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        two.setenv(name, "false")
    check_launch(settings_of(tmp_path))
    two.setattr(ranks, "compare_versions", lambda *_: True)
    with pytest.raises(UserError, match=r'pip install "accelerate>=1\.15"'):
        check_launch(settings_of(tmp_path))


def test_deepspeed_is_refused_where_it_is_missing_and_where_it_would_hide_the_kl(
    two: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    two.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    two.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="DeepSpeed is not installed; pip install deepspeed"):
        check_launch(settings_of(tmp_path, method="mle"))
    two.setattr("importlib.util.find_spec", lambda name: object())
    check_launch(settings_of(tmp_path, method="mle"))
    with pytest.raises(UserError, match="keeps gradients to itself, so the KL of scalabl cannot"):
        check_launch(settings_of(tmp_path))


@pytest.mark.parametrize(
    ("name", "blocks"), [("bert", {"BertLayer"}), ("mpnet", {"MPNetLayer"}), ("llama", {"LlamaDecoderLayer"})]
)
def test_a_model_is_sharded_by_its_layers_and_never_its_embeddings_twice(
    name: str, blocks: set[str], tmp_path: Path
) -> None:
    model = stock_head(tmp_path / "adapter", body_of(name, tmp_path / "body"))
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    shard_by_layers(plugin, model)
    assert set(plugin.transformer_cls_names_to_wrap) == blocks
    plugin.transformer_cls_names_to_wrap = ["Mine"]
    shard_by_layers(plugin, model)
    assert plugin.transformer_cls_names_to_wrap == ["Mine"]


def test_a_batch_over_all_processes_needs_as_many_rows(two: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_rows(settings_of(tmp_path, batch_size=4), 8)
    with pytest.raises(UserError, match="take 8 rows at a time, but there are 7"):
        require_rows(settings_of(tmp_path, batch_size=4), 7)


def test_commands_of_one_process_are_refused_in_several(two: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from scalabl.cli import inspect  # noqa: F401  (adds its command)
    from scalabl.cli.app import app

    ended = CliRunner().invoke(app, ["inspect", "nowhere"])
    assert str(ended.exception) == "inspect runs in one process; several are for train, evaluate, predict."


@pytest.mark.parametrize("number", [0, 1, 5, 10, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_particle_belongs_to_one_rank_and_the_shares_are_even(number: int, count: int) -> None:
    shares = [share(number, rank, count) for rank in range(count)]
    assert [particle for own in shares for particle in own] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_draw_the_rows_of_one_process_and_a_draw_of_the_batch_is_one_for_all() -> None:
    for draws in ("sequence", "batch"):
        leaves = list(stochastic_layers(adapted(draws=draws).train()).values())

        def drawn(rows: int, share: tuple[int, int], leaves: Any = leaves) -> list[torch.Tensor]:
            torch.manual_seed(5)
            for leaf in leaves:
                leaf.share = share
            return [leaf.draw(rows, torch.device("cpu")).detach() for leaf in leaves]

        whole, parts = drawn(6, (0, 1)), [drawn(2, (rank, 3)) for rank in range(3)]
        for layer, of_all in enumerate(whole):
            of_each = [part[layer] for part in parts]
            if draws == "sequence":
                assert torch.equal(torch.cat(of_each), of_all) and len(of_all.unique(dim=0)) == 6
            else:
                assert all(torch.equal(one, of_all) for one in of_each)


def test_dropout_is_seen_in_modules_and_in_the_configuration() -> None:
    assert not has_dropout(adapted())
    assert has_dropout(adapted(lora_dropout=0.1))
    base, _ = loaded()
    base.config.attention_dropout = 0.1
    assert has_dropout(get_peft_model(base, scalabl.ScalaBLConfig(r=4, target_modules=["q_proj"])))


def test_a_layer_that_redraws_its_noise_in_the_backward_pass_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    redraws = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"preserve_rng_state": False},
    )
    with pytest.raises(UserError, match="draws other noise in the backward pass"):
        refuse_hidden_gradients(redraws, nn.Linear(2, 2), optimizer)
    for preserves in (True, False):
        model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2), preserve_rng_state=preserves))
        if preserves:
            refuse_hidden_gradients(arguments, model, optimizer)
        else:
            with pytest.raises(UserError, match="draws other noise in the backward pass"):
                refuse_hidden_gradients(arguments, model, optimizer)


def test_a_run_continues_in_other_processes_where_its_steps_keep_their_rows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = settings_of(tmp_path, batch_size=4, gradient_accumulation=3)
    run.mkdir()
    write_json(run / "scalabl.json", {"recipe": settings.as_dict(), "status": "running", "processes": 2})
    for batch_size, accumulation, number in ((4, 3, 2), (8, 3, 1), (4, 6, 1), (2, 3, 4), (1, 4, 6)):
        other = settings.changed(batch_size=batch_size, gradient_accumulation=accumulation)
        assert claim(run, other, processes=number) is False
    with pytest.raises(
        UserError, match="run of 24 rows a step .* x 3 processes are 36; choose a batch size that makes 24"
    ):
        claim(run, settings, processes=3)
    with pytest.raises(UserError, match="seed was 0, now 1"):
        claim(run, settings.changed(batch_size=8, seed=1), processes=1)


def test_a_checkpoint_gets_the_random_states_that_its_next_processes_look_for(
    two: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "trainer_state.json"
    write_json(state, {"global_step": 5, "train_batch_size": 8})
    (tmp_path / "rng_state.pth").write_text("of one process")
    write_json(tmp_path / "sha256.json", {state.name: sha256(state)})
    fit_checkpoint(tmp_path, dropout=True, batch_size=4)
    assert json.loads(state.read_text()) == {"global_step": 5, "train_batch_size": 4}
    assert json.loads((tmp_path / "sha256.json").read_text()) == {state.name: sha256(state)}  # it is not damaged
    assert len(list(tmp_path.iterdir())) == 3  # the ranks' streams differ: one process's is nobody's
    fit_checkpoint(tmp_path, dropout=False, batch_size=4)
    assert {(tmp_path / f"rng_state_{rank}.pth").read_text() for rank in range(2)} == {"of one process"}
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    with pytest.raises(UserError, match="written under FSDP and cannot be resumed without it"):
        fit_checkpoint(tmp_path, dropout=False, batch_size=4)


def test_in_one_process_nothing_is_shared() -> None:
    assert (
        processes.world_size() == 1
        and processes.is_main()
        and processes.own_device() is None
        and not processes.is_sharded()
    )
    assert processes.on_main(lambda: [1]) == [1] and processes.first_on_each_machine(lambda: "done") == "done"
    assert processes.anywhere(True) and not processes.anywhere(False) and processes.is_first_to_fail()
