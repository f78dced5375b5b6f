"""The scale benchmark at toy size: the same code on a CPU, started blind, stopped, and started again."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import scale
import scale_cells
import torch
from extra_parameters import SHAPES, TARGETS
from scale import COLUMNS, markdown, rows
from scale_cells import DTYPE, Clock, OutOfTime, adapted, adapter_numbers, base_bytes, build, rounds_of
from training_cost import step_of
from transformers import AutoModelForCausalLM

TOY = [
    "--device", "cpu", "--models", "tiny", "--batches", "2", "--length", "6", "--steps", "3", "--rounds", "1",
    "--samples", "3", "--new-tokens", "3",
]  # fmt: skip
CELLS = [
    f"tiny/{bits} bit/{part}" for bits in (16, 4) for part in ("train/batch 2", "decode/batch 1", "predict/batch 2")
]


def call(output: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["scale.py", *TOY, "--output", str(output), *more])
    scale.main()
    content: dict[str, Any] = json.loads((output / "scale.json").read_text(encoding="utf-8"))
    return content


def needs(bits: int) -> None:
    """Leave the test out where a base of so many bits cannot be held."""
    if bits == 4:
        pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a whole run."""
    needs(4)
    output = tmp_path_factory.mktemp("scale")
    with pytest.MonkeyPatch.context() as patch:
        call(output, patch)
    return output


def test_every_method_is_measured_on_every_base(finished: Path) -> None:
    content = json.loads((finished / "scale.json").read_text(encoding="utf-8"))
    assert list(content["cells"]) == CELLS
    lines = list(csv.DictReader(io.StringIO((finished / "scale.csv").read_text(encoding="utf-8"))))
    assert tuple(lines[0]) == COLUMNS and len(lines) == 2 * (3 + 3 + 3)
    found = {(line["part"], line["bits"], line["method"]): line for line in lines}
    for bits in ("16", "4"):
        for method in ("lora", "scalabl", "blob"):
            line = found["train", bits, method]
            assert int(line["rounds"]) == 3 and int(line["peak_bytes"]) > 0
            tokens = 2 * 6 / float(line["step_seconds"])
            assert float(line["tokens_per_second"]) == pytest.approx(tokens)
        assert float(found["train", bits, "lora"]["time_ratio"]) == 1
        assert float(found["train", bits, "lora"]["memory_ratio"]) == 1
        assert found["predict", bits, "auto"]["note"].startswith(("mc, N = 3", "linearized"))
        one, three = (found["decode", bits, f"scalabl, {name}"] for name in ("1 particle", "3 particles"))
        assert (one["particles"], three["particles"]) == ("1", "3")
        assert float(three["decode_tokens_per_second"]) == pytest.approx(3 / float(three["step_seconds"]))
    page = (finished / "scale.md").read_text(encoding="utf-8")
    assert "## Training" in page and "## Decoding" in page and "Not measured" not in page
    assert "Memory of a ScalaBL step within 1.01" in page and "- seeds: 0" in page


def test_a_second_start_measures_nothing_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((finished / "scale.json").read_text(encoding="utf-8"))
    output = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.setattr(scale_cells, "build", None)
    after = call(output, monkeypatch)
    assert after["rows"] == before["rows"]
    with pytest.raises(SystemExit, match="other settings"):
        call(output, monkeypatch, "--length", "7")
    assert json.loads((output / "scale.json").read_text(encoding="utf-8")) == after


def test_it_goes_on_behind_the_last_cell_and_past_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB.\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(scale, "decode", killed)
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path, patch, "--bits", "16")
    first = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))["cells"]
    assert list(first) == CELLS[:1] and (tmp_path / "scale.md").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(scale, "train", killed)  # is done
        patch.setattr(scale, "decode", too_large)
        second = call(tmp_path, patch, "--bits", "16")["cells"]
    assert [cell["status"] for cell in second.values()] == ["done", "failed", "done"]
    assert second[CELLS[0]] == first[CELLS[0]]
    assert second[CELLS[1]]["reason"] == "out of memory: Tried to allocate 20 GiB."
    assert f"- {CELLS[1]}: failed, out of memory" in (tmp_path / "scale.md").read_text(encoding="utf-8")
    third = call(tmp_path, monkeypatch, "--bits", "16")["cells"]  # tried again
    assert [cell["status"] for cell in third.values()] == ["done"] * 3


@pytest.mark.parametrize(
    ("setting", "options", "reason"),
    [("free_bytes", [], "are free"), ("", ["--budget", "16"], "are left of 16"), ("build", [], "the base model: ")],
)
def test_what_cannot_be_done_is_said_and_does_not_stop_it(
    setting: str, options: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def refused(*_: Any) -> Any:
        built.append(1)
        raise ValueError("no such thing")

    monkeypatch.setattr(scale_cells, "build", refused)
    if setting == "free_bytes":
        monkeypatch.setattr(scale_cells, "free_bytes", lambda _: 10_000)
    content = call(tmp_path, monkeypatch, *options)
    assert list(content["cells"]) == CELLS and not content["rows"]
    assert all(reason in cell["reason"] for cell in content["cells"].values())
    assert len(built) == (2 if setting == "build" else 0)  # one base for its three cells, or none


@pytest.mark.parametrize("bits", [16, 4])
def test_a_base_is_that_of_its_configuration(bits: int) -> None:
    needs(bits)
    base = build("tiny", bits, "cpu", seed=0)
    usual = AutoModelForCausalLM.from_config(SHAPES["tiny"].config(), dtype=DTYPE)
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*base.parameters(), *base.buffers()))
    for (name, found), (wanted_name, wanted) in zip(base.named_buffers(), usual.named_buffers(), strict=True):
        assert name == wanted_name and torch.equal(found, wanted)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    used = sum(p.numel() * p.element_size() for p in base.parameters())
    assert used == pytest.approx(base_bytes("tiny", bits), rel=0.02)
    again = build("tiny", bits, "cpu", seed=0)
    assert all(torch.equal(one, other) for one, other in zip(base.parameters(), again.parameters(), strict=True))
    projection = base.model.layers[1].mlp.up_proj
    weight = projection.weight
    if bits == 4:
        from bitsandbytes.functional import dequantize_4bit

        assert weight.dtype == torch.uint8 and weight.quant_state.nested and weight.quant_state.quant_type == "nf4"
        weight = dequantize_4bit(weight.data, weight.quant_state)
    assert weight.shape == (128, 64) and weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    ids = torch.arange(6)[None]
    assert base(ids).logits.float().std() > 0.01


@pytest.mark.parametrize("method", scale_cells.METHODS)
@pytest.mark.parametrize("bits", [16, 4])
def test_methods_share_the_base_and_each_steps_its_own(method: str, bits: int, tmp_path: Path) -> None:
    needs(bits)
    base = build("tiny", bits, "cpu", seed=0)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = adapted(base, method, seed=0)
    own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter_numbers(base.config, method)
    addresses = {p.data_ptr() for p in base.parameters()}
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in own}
    # an output layer that shares the embedding's weight gets one of its own from ScalaBL and BLoB
    assert {name for name, p in frozen.items() if p.data_ptr() not in addresses} <= {
        "base_model.model.lm_head.base_layer.weight"
    }
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    step_of(model, method, torch.arange(12).view(2, 6), tmp_path)()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]) == (id(parameter) not in own), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


def test_blob_is_charged_for_the_step_of_its_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[Any] = []
    monkeypatch.setattr("scalabl.methods.blob.kl_step", lambda leaf, *_: stepped.append(leaf))
    model = adapted(build("tiny", 16, "cpu", seed=0), "blob", seed=0)
    step_of(model, "blob", torch.arange(12).view(2, 6), tmp_path)()
    assert len(stepped) == 2 * 2 + 1  # q_proj and v_proj of two layers, lm_head


def test_training_recomputes_and_predicting_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured passes are those that they are said to be."""
    base, clock = build("tiny", 16, "cpu", seed=0), Clock(60)
    passes: list[tuple[str, int]] = []
    attention = type(base.model.layers[0].self_attn)  # inside of what is checkpointed
    forward = attention.forward

    def counting(self: Any, hidden_states: torch.Tensor, **options: Any) -> Any:
        passes.append(("train" if self.training else "eval", hidden_states.shape[0]))
        return forward(self, hidden_states=hidden_states, **options)

    monkeypatch.setattr(attention, "forward", counting)
    found = scale_cells.train(base, 2, 6, 1, 0, clock)
    assert list(found) == ["lora", "scalabl", "blob"] and all(len(line["seconds"]) == 1 for line in found.values())
    # of each method two steps for its memory, and two of warm-up before one; two layers, run twice each
    assert passes == [("train", 2)] * (3 * (2 + 2 + 1) * 2 * 2)
    passes.clear()
    scale_cells.predict(base, 2, 6, 3, 1, 0, clock)
    assert ("eval", 2) in passes and ("eval", 2 * 3) in passes
    passes.clear()
    found = scale_cells.decode(base, 6, 4, 3, 1, 0, clock)
    assert [line["particles"] for line in found.values()] == [1, 1, 3]
    assert passes.count(("eval", 3)) == 3 * 4 * 2  # for memory, warm-up and one round: four tokens, two layers
    assert all(second > 0 for line in found.values() for second in line["seconds"])


def test_adapters_have_the_papers_numbers() -> None:
    small, large = SHAPES["qwen2.5-7b"].config(), SHAPES["qwen2.5-32b"].config()
    assert adapter_numbers(small, "lora") == 3_768_320
    assert adapter_numbers(small, "scalabl") - adapter_numbers(small, "lora") == 912
    assert adapter_numbers(small, "blob") - adapter_numbers(small, "lora") == 1_634_304
    assert adapter_numbers(large, "lora") == 9_646_080
    assert adapter_numbers(large, "scalabl") - adapter_numbers(large, "lora") == 2_064
    assert TARGETS == ("q_proj", "v_proj", "lm_head")


def test_32b_is_estimated_to_fit_a_card_of_78_gib() -> None:
    largest = scale_cells.training_bytes("qwen2.5-32b", 16, 4 * 300, scale_cells.METHODS)
    assert base_bytes("qwen2.5-32b", 16) == 65_527_752_704
    assert base_bytes("qwen2.5-32b", 16) < largest < 78 * 2**30 / 1.02


def test_rounds_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(scale_cells.time, "monotonic", lambda: now[0])
    order: list[str] = []

    def measure(name: str) -> float:
        now[0] += 1
        order.append(name)
        return now[0]

    found = rounds_of(["a", "b"], 20, 0, Clock(21), measure)  # two seconds a round, two of warm-up
    assert len(found["a"]) == len(found["b"]) == 8  # one second is left, and a round takes two
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, len(order), 2))
    assert len({tuple(order[i : i + 2]) for i in range(0, len(order), 2)}) == 2  # in both orders
    with pytest.raises(OutOfTime, match="after 2 rounds"):
        rounds_of(["a", "b"], 20, 0, Clock(10), measure)


def cell(model: str, bits: int, lora: list[float], scalabl: list[float]) -> dict[str, Any]:
    lines = {"lora": {"seconds": lora, "peak": 1000}, "scalabl": {"seconds": scalabl, "peak": 1005}}
    about = {"model": model, "bits": bits, "part": "train", "batch": 4, "status": "done", "settings": {"length": 300}}
    return about | {"lines": lines}


def test_ratios_are_paired_by_round_and_what_was_not_measured_is_listed() -> None:
    cells = {
        "7": cell("qwen2.5-7b", 16, [1.0, 2.0, 4.0], [1.01, 2.02, 4.04]),
        "32": cell("qwen2.5-32b", 16, [1.0, 1.0, 1.0], [1.5, 1.5, 1.5]),
        "14": {"status": "skipped", "reason": "it takes about 90 GiB"},
    }
    lora, scalabl, *_ = rows(cells)
    assert (lora["time_ratio"], scalabl["memory_ratio"], scalabl["step_seconds"]) == (1, 1.005, 2.02)
    for name in ("time_ratio", "time_ratio_low", "time_ratio_high"):
        assert scalabl[name] == pytest.approx(1.01)
    assert scalabl["tokens_per_second"] == pytest.approx(4 * 300 / 2.02)
    page = markdown(rows(cells), cells, {"device": "a card"})
    assert "within 1.02 of plain LoRA's: 1 of 2; not Qwen2.5-32B at 16 bit, batch 4 (1.500)" in page
    assert "within 1.01 of plain LoRA's: 2 of 2." in page and "- 14: skipped, it takes about 90 GiB" in page
