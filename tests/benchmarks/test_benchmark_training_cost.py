"""The training cost at toy size: every method really trains its own adapter on one shared base."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_cost
from training_cost import METHODS, adapt, load, step_of, times


@pytest.fixture
def base() -> torch.nn.Module:
    return load("", "tiny", "cpu", "float32", seed=0)


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(0))


def test_every_method_is_stepped_once_a_round(base, batch) -> None:
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    measured = times(base, list(METHODS), batch, rounds=3, warmup=1, seed=0)
    assert set(measured) == set(METHODS)
    assert all(len(steps) == 3 and min(min(step) for step in steps) > 0 for steps in measured.values())
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_methods_share_the_base_and_train_their_own(method, base, batch, tmp_path) -> None:
    model = adapt(base, method)
    step = step_of(model, method, batch, tmp_path)
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert shared == {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    step()
    step()  # A gets a gradient as soon as B is not zero
    still = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert not still
    assert any(".posterior." in name for name in trained) == method.startswith("scalabl")
    assert any("monteclora" in name for name in trained) == method.startswith("monteclora")


def test_scalabl_is_charged_for_the_kl(base, batch, tmp_path, monkeypatch) -> None:
    added = []
    monkeypatch.setattr("scalabl.training.callback.add_kl_gradients", lambda posteriors, *_: added.extend(posteriors))
    step_of(adapt(base, "scalabl"), "scalabl", batch, tmp_path)()
    assert len(added) == 4  # q_proj and v_proj of two layers


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocators = []

    def in_this_process(line: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        allocators.append(env.get("MALLOC_MMAP_THRESHOLD_"))
        assert Path(line[1]).samefile(training_cost.__file__)
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", line[1:])
            training_cost.main()
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr("training_cost.subprocess", SimpleNamespace(run=in_this_process, DEVNULL=None, PIPE=None))
    toy = ["--shape", "tiny", "--batch", "2", "--length", "4", "--rounds", "2", "--warmup", "1"]
    toy += ["--memory-repeats", "1", "--memory-steps", "1", "--methods", "scalabl", "--output", str(tmp_path)]
    toy += ["--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["training_cost.py", *toy])
    training_cost.main()
    content = json.loads((tmp_path / "training_cost.json").read_text(encoding="utf-8"))
    assert list(content["methods"]) == ["lora", "scalabl"]
    assert content["methods"]["lora"]["step_wall"]["ratios"] == [1.0, 1.0]
    assert len(content["methods"]["scalabl"]["step_processor"]["ratios"]) == 2
    assert content["methods"]["scalabl"]["peak_memory"]["median"] > 0.5
    assert allocators == [None, "65536", "65536", None, None]  # the timed steps, then two methods with each allocator
    assert {"model", "data", "seeds", "versions", "device", "command"} <= set(content["facts"])
    assert METHODS["scalabl"] in (tmp_path / "training_cost.md").read_text(encoding="utf-8")


def test_a_failed_measurement_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr="out of memory")
    monkeypatch.setattr("training_cost.subprocess", SimpleNamespace(run=lambda *_, **__: failed, DEVNULL=0, PIPE=0))
    monkeypatch.setattr("sys.argv", ["training_cost.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="out of memory"):
        training_cost.main()
    assert not list(tmp_path.iterdir())


def test_ratios_are_of_the_same_round() -> None:
    # the machine slows down threefold; each pair still says 1.5
    found = training_cost.to_baseline({"lora": [1.0, 3.0, 2.0], "scalabl": [1.5, 4.5, 3.0]})
    assert found["scalabl"]["ratios"] == [1.5, 1.5, 1.5]
    assert (found["scalabl"]["median"], found["scalabl"]["low"], found["scalabl"]["high"]) == (1.5, 1.5, 1.5)
