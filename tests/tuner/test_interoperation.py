"""PEFT's and transformers' own ways of loading an adapter, after a mere `import scalabl`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix import adapt, close, load_base, logits, perturb, saved_base, tokens
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from tiny_base import require_peft
from torch import Tensor

import scalabl
from scalabl.core.errors import UserError
from scalabl.tuner import stochastic_layers
from scalabl.tuner.config import write_mean_adapter

IDS = tokens(2)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tensor, Tensor]:
    """The adapter's directory, the mean's logits and those of two particles."""
    model = adapt(load_base(), task_type="CAUSAL_LM").eval()
    model.save_pretrained(str(tmp_path))
    with scalabl.particles(model, 2, seed=0):
        return tmp_path, _mean(model), logits(model, IDS)


def _mean(model: torch.nn.Module) -> Tensor:
    with scalabl.mean(model):
        return logits(model, IDS)


def test_pefts_auto_classes(saved: tuple[Path, Tensor, Tensor]) -> None:
    path, mean, drawn = saved
    config = PeftConfig.from_pretrained(str(path))
    assert isinstance(config, scalabl.ScalaBLConfig) and config.peft_type == "SCALABL"
    assert config.base_model_name_or_path == str(saved_base("llama", 0))
    model = AutoPeftModelForCausalLM.from_pretrained(str(path)).eval()
    assert torch.equal(logits(model, IDS), mean)
    with scalabl.particles(model, 2, seed=0):
        assert torch.equal(logits(model, IDS), drawn)


def test_transformers_own_adapter_methods(saved: tuple[Path, Tensor, Tensor]) -> None:
    require_peft()
    path, mean, drawn = saved
    model = load_base()
    base_answer = logits(model, IDS)
    model.load_adapter(str(path))
    model.eval()
    assert close(logits(model, IDS), mean, 1e-5)
    assert list(stochastic_layers(model)) == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    with scalabl.particles(model, 2, seed=0):
        assert close(logits(model, IDS), drawn, 1e-5)
    assert scalabl.kl_divergence(model) > 0
    model.disable_adapters()
    assert torch.equal(logits(model, IDS), base_answer)
    model.enable_adapters()
    model.load_adapter(str(path), adapter_name="second")
    model.set_adapter("second")
    assert close(logits(model, IDS), mean, 1e-5)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert close(logits(model, IDS), mean, 1e-5)


def test_transformers_own_saving_leaves_no_mean_of_older_weights(saved: tuple[Path, Tensor, Tensor]) -> None:
    """It writes the configuration before the weights."""
    require_peft()
    path, mean, _ = saved
    model = load_base()
    model.load_adapter(str(path))
    perturb(model, seed=8)
    answer = logits(model.eval(), IDS)
    assert not close(answer, mean, 1e-3)
    assert (path / "mean" / "adapter_model.safetensors").exists()
    model.save_pretrained(path)
    assert not (path / "mean").exists()
    again = load_base()
    again.load_adapter(str(path))
    assert close(logits(again.eval(), IDS), answer, 1e-5)
    write_mean_adapter(path, again.peft_config["default"])
    plain = PeftModel.from_pretrained(load_base(), str(path / "mean")).eval()
    assert close(logits(plain, IDS), answer, 1e-5)


def test_transformers_refuses_another_base_too(saved: tuple[Path, Tensor, Tensor]) -> None:
    with pytest.raises(UserError, match="trained on another base model"):
        load_base(seed=1).load_adapter(str(saved[0]))


IMPORT_ORDERS = (
    "import peft, scalabl",
    "import transformers, scalabl, peft",
    "import scalabl.tuner, peft",
    "from scalabl import ScalaBLConfig; import peft",
    "import scalabl; from transformers import TrainerCallback; import peft",  # a module that imports PEFT itself
)
_REGISTERED = """
config = peft.PeftConfig.from_pretrained(sys.argv[1])
assert type(config).__name__ == "ScalaBLConfig", config
assert config.peft_type in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
"""
# what importing PEFT takes is mostly what it imports itself: that is done once, before the process splits
_EACH_ORDER = """
import os, sys, traceback
import accelerate, importlib.util, torch
if importlib.util.find_spec("bitsandbytes"):
    import bitsandbytes
from transformers import BloomPreTrainedModel
assert not {"peft", "scalabl"} & set(sys.modules)
for program in sys.argv[2:]:
    if not (child := os.fork()):
        try:
            exec(program)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(program)
"""


def test_any_order_of_imports_registers_the_tuner(saved: tuple[Path, Tensor, Tensor]) -> None:
    first = "import sys, scalabl, peft" + _REGISTERED
    others = [_EACH_ORDER, str(saved[0]), *(order + _REGISTERED for order in IMPORT_ORDERS)]
    for program in ([first, str(saved[0])], others):
        ended = subprocess.run([sys.executable, "-W", "ignore", "-c", *program], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr


def test_importing_scalabl_alone_imports_no_torch() -> None:
    program = "import scalabl, sys; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
