"""The variational parameters' own parameter group, which exists only while `optimizer.step()` runs.

The ~1,000 variational numbers need a larger learning rate than A and B (at AdamW's 1e-4 log sigma moves by 0.25 at
most in 5,000 steps, and the data hardly decides sigma), and never weight decay: their prior is the KL's business, a
decay of log s towards 0 would be a second one. A lasting third group would have to be known by whoever builds the
optimiser and the LR scheduler, and would be in every saved optimiser state: a checkpoint could not be resumed without
it. So step hooks take the parameters out of their groups right before an update and put them back right after.
Optimisers key their state (momentum, second moments) by parameter, so that it is not touched by the move.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from scalabl.core.errors import UserError

Group = dict[str, Any]


def innermost(optimizer: Optimizer) -> Optimizer:
    """The torch optimiser inside Accelerate's wrapper, or the optimiser itself."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


class VariationalGroup:
    """Gives `parameters` their own learning rate, and no weight decay, in every step of `optimizer`.

    In a step the parameters of each native group form a group of their own, with that group's hyperparameters but
    weight_decay = 0 and lr = learning_rate * (native lr / native initial lr): the LR schedule's factor is theirs
    as well. Before and after a step the optimiser's groups are the native ones, the same lists in the same order.

    Args:
        optimizer: the optimiser, wrapped by Accelerate or not.
        parameters: parameters in the optimiser's groups.
        learning_rate: their learning rate at a schedule factor of 1; None keeps the native group's.
        base_learning_rate: the native rate at a factor of 1, for groups without the `initial_lr` that LR schedulers
            leave.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        *,
        learning_rate: float | None,
        base_learning_rate: float,
    ) -> None:
        self.optimizer = innermost(optimizer)
        self.learning_rate = learning_rate
        self.base_learning_rate = base_learning_rate
        self._ids = {id(parameter) for parameter in parameters}
        self._native: list[tuple[Group, list[nn.Parameter]]] = []
        self._own: list[Group] = []
        self._hooks = [
            self.optimizer.register_step_pre_hook(lambda *_: self._take_out()),
            self.optimizer.register_step_post_hook(lambda *_: self._end()),
        ]

    def remove(self) -> None:
        """Remove the hooks; the groups are the native ones even if a step had been cut short by an error."""
        self._put_back()
        for hook in self._hooks:
            hook.remove()

    def _take_out(self) -> None:
        self._put_back()  # a step that raised has left its groups
        for group in self.optimizer.param_groups:
            own = [parameter for parameter in group["params"] if id(parameter) in self._ids]
            if own:
                self._native.append((group, group["params"]))
                self._own.append(self._own_group(group, own))
        for group, parameters in self._native:
            group["params"] = [parameter for parameter in parameters if id(parameter) not in self._ids]
        self.optimizer.param_groups.extend(self._own)

    def _end(self) -> None:
        """Put the groups back, unless the optimiser kept in them what depends on the rate: it would be lost.

        Raises:
            UserError: schedule-free optimisers do, their averages are weighed by the rates of all steps.
        """
        kept = {
            name
            for (native, _), own in zip(self._native, self._own, strict=True)
            for name, value in own.items()
            if name not in ("lr", "weight_decay") and isinstance(value, int | float) and value != native[name]
        }
        self._put_back()
        if kept:
            raise UserError(
                f"{type(self.optimizer).__name__} keeps {', '.join(sorted(kept))} of a learning rate in its parameter "
                "groups, so that the posterior cannot have a rate of its own; give ELBOCallback learning_rate=None, or "
                "choose another optimiser, for instance adamw_torch."
            )

    def _put_back(self) -> None:
        for group, parameters in self._native:
            group["params"] = parameters
        own = {id(group) for group in self._own}
        self.optimizer.param_groups[:] = [group for group in self.optimizer.param_groups if id(group) not in own]
        self._native, self._own = [], []

    def _own_group(self, native: Group, parameters: list[nn.Parameter]) -> Group:
        group = {**native, "params": parameters}
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
        if self.learning_rate is not None:
            group["lr"] = self.learning_rate * self._schedule_factor(native)
        return group

    def _schedule_factor(self, native: Group) -> Any:
        initial = native.get("initial_lr", self.base_learning_rate)
        # a relative step (lr None) and a rate of 0 have no schedule that could be read off
        return 1.0 if native["lr"] is None or not initial else native["lr"] / initial
