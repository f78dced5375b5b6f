"""What every room does to a torch module, by any of its names: eval mode for a while, shards gathered, names stripped.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

# what torch.compile, FSDP and checkpointing wrappers put into the names of the modules inside them
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor, whole where it is sharded over processes (a DTensor); all of them have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def base_name(name: str) -> str:
    """The name in the base model, without what PEFT and wrappers put in front or between."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.")


def split_leaf(name: str) -> tuple[str, str]:
    """(adapted layer, what is behind its `lora_A`) of a module's, parameter's or stored tensor's name; ("...", "") of
    one that is not at an A."""
    layer, _, rest = base_name(name).partition(".lora_A.")
    return layer, rest
