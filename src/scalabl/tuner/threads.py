"""Several threads on one model: whose pass a state or a hook is for, and one prediction at a time.

A prediction gives the model's leaves a state, hangs hooks into it and stands in for its lower layers. All of that is
for the passes of its own thread: a plain pass of another thread meets the model as it is. Two predictions with one
model would stand in for each other's layers, so one waits for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # type: ignore[valid-type]
_GUARD = threading.Lock()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Context of a prediction with a model: another thread's waits for its end, one inside it does not.

    Args:
        model: by any of its wrappers; adapters on one base model share it.
    """
    with _GUARD:
        lock = _LOCKS.setdefault(base_model(model), threading.RLock())
    with lock:
        yield


def base_model(model: Any) -> nn.Module:
    """The base model inside DistributedDataParallel, torch.compile and PEFT."""
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if inner is model:
            return inner
        model = inner


def own(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A forward hook for the passes of the calling thread alone."""
    thread = threading.get_ident()

    def of_thread(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == thread else None

    return of_thread


@dataclass(eq=False)
class Scope:
    """A context that gives leaves a state: of one thread, until it is closed."""

    thread: int = field(default_factory=threading.get_ident)
    is_open: bool = True

    def holds_here(self) -> bool:
        """Whether a pass of the calling thread is within it."""
        if not self.is_open:
            return False
        # a compiler has no threads, and layers that a backward pass runs again are run by a thread of autograd's own
        if torch.compiler.is_compiling() or self.thread == threading.get_ident():
            return True
        return torch._C._current_graph_task_id() != -1
