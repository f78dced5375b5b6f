"""The processes of one command (`accelerate launch -m scalabl ...`): who is who, what one does for all, how they fail.

Messages between them are short and go through the key-value store that the launcher keeps: that needs no process group,
can take as long as the work does, and still answers when a process has died. With one process nothing here does more
than call a function; torch is imported by several processes alone.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from scalabl.core.errors import UserError

T = TypeVar("T")
_LONG = timedelta(days=7)  # of the work that one process does for all
_UNEVEN = timedelta(hours=6)  # between the processes' arrivals at one point
_board: Any = None
_number_of_message = itertools.count()


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def is_first_on_machine() -> bool:
    """Whether this process is the first of its machine."""
    return world_size() == 1 or int(os.environ.get("LOCAL_RANK", "0")) == 0


def is_sharded() -> bool:
    """Whether the launcher sets up FSDP: the base's weights are then spread over the processes."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def uses_deepspeed() -> bool:
    """Whether the launcher sets up DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def own_device() -> str | None:
    """Where this process computes; None where one process is free to choose."""
    if world_size() == 1:
        return None
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def connect() -> None:
    """Join the process group; does nothing in one process."""
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        if not torch.cuda.is_available():
            # Accelerate's own name is "cpu:0", which older Transformers gives torch.load, and that knows no such place
            os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        # the ranks' shares take different times
        PartialState(cpu=not torch.cuda.is_available(), timeout=_UNEVEN)


def let_cpus_shard() -> None:
    """Let a Trainer that is made next shard on the CPU too, under FSDP; to be called after its arguments were made.

    Accelerate shards on accelerators alone and on the CPU trains with DDP without a word. FSDP 2 itself works there, so
    that its state gets the type of an accelerator: slow, but the same code.
    """
    if not is_sharded():
        return
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def on_main(work: Callable[[], T]) -> T:
    """Call a function in the main process alone; every process gets what it returns.

    Args:
        work: returns what JSON can hold.

    Raises:
        UserError: in every process, what it raised in the main one.
    """
    if world_size() == 1:
        return work()
    key = f"message {next(_number_of_message)}"
    if is_main():
        try:
            result = work()
        except UserError as error:
            _store().set(key, json.dumps({"error": str(error)}))
            raise
        _store().set(key, json.dumps({"result": result}))
        return result
    message = json.loads(_store().get(key))
    if "error" in message:
        raise UserError(message["error"])
    sent: T = message["result"]
    return sent


def first_on_each_machine(work: Callable[[], T]) -> T:
    """Call a function in every process, in the others of a machine when its first has done: they find its files.

    Raises:
        UserError: in every process, what it raised in any first one.
    """
    if world_size() == 1:
        return work()
    firsts = world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    key = f"message {next(_number_of_message)}"
    result: Any = None
    if is_first_on_machine():
        result = work()
        _store().add(f"{key} done", 1)
        if _store().add(f"{key} done", 0) == firsts:
            _store().set(key, "")
    else:
        _store().get(key)
        result = work()
    made: T = result
    return made


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them have to ask."""
    import torch

    if world_size() == 1 or not torch.distributed.is_initialized():
        return flag
    from accelerate import PartialState

    found = torch.tensor(int(flag), device=PartialState().device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def is_first_to_fail() -> bool:
    """Whether no other process has failed before: the first one says why, the others were dragged along."""
    if world_size() == 1:
        return True
    connected = _board is not None
    try:
        return int(_store().add("failed", 1)) == 1
    except Exception:  # the launcher is already going down, or was never there
        return not connected


@contextmanager
def cleaning_up(clean: Callable[[], None]) -> Iterator[None]:
    """What fails within it is cleaned up after by the main process.

    A launcher ends the others by SIGTERM when one process has failed. Here that is a failure too; the next one is not
    heeded until all is clean.

    Args:
        clean: removes what an unfinished work leaves.
    """
    several = world_size() > 1 and is_main() and threading.current_thread() is threading.main_thread()

    def end(signum: int, _frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end) if several else None
    try:
        yield
    except BaseException:
        if several:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_main():
            clean()
        raise
    finally:
        if several:
            signal.signal(signal.SIGTERM, before)


def _store() -> Any:
    """The launcher's key-value store (of the process group, where the launcher keeps none)."""
    global _board
    if _board is None:
        from torch.distributed import PrefixStore, TCPStore

        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            connect()
        host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
        store = TCPStore(host, port, is_master=False, timeout=timedelta(minutes=5))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _board = PrefixStore(f"scalabl {attempt}", store)
        _board.set_timeout(_LONG)
    return _board
