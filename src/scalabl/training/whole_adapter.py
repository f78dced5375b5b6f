"""An adapter's weights as whole tensors, wherever they are: what is saved loads in one process."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor


def whole_adapter(model: PeftModel) -> dict[str, Tensor] | None:
    """The trained weights, gathered where they are shards (FSDP 2, ZeRO-3); None where PEFT finds them whole by itself.

    Every process has to call it, each gets all of them; the frozen base is not gathered.

    Args:
        model: the model, sharded or not.

    Returns:
        parameter name -> the tensor, on the CPU.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(hasattr(parameter, "ds_id") for parameter in trained.values()):  # DeepSpeed has left empty tensors
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(list(trained.values())):
            return {name: p.detach().cpu().clone() for name, p in trained.items()}
    if not any(hasattr(parameter, "full_tensor") for parameter in trained.values()):
        return None
    return {
        name: (p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()).cpu()  # type: ignore[attr-defined]
        for name, p in trained.items()
    }
