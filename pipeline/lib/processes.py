"""One job on several GPUs: each process that torchrun (or `accelerate launch`) starts does a share of the work.

A stage started plainly is the only process and does all of it.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pipeline.lib.stage import BadInput

PATIENCE = timedelta(hours=12)  # for the slowest share

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def state() -> Any:
    """Return this process's device, and its place among the others.

    Traps: unless told that it is to use the CPU, accelerate lets each process there think that it is the only one; and
    a process that ends without a word to the others may be aborted by a thread that still listens to them.
    """
    found: Any = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if found.num_processes != started:
        raise BadInput(f"{started} processes were started, but they see {found.num_processes}: they would do all alike")
    atexit.register(found.destroy_process_group)
    if started > 1:
        gather_object([None])  # two processes on one GPU fail at what they first say to each other: now, not at the end
    return found


def share(work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """Return what `work` makes of all items, in order. It returns one result an item.

    Of n processes each does every n-th item: neighbours, such as the rows to forget, take alike long.
    """
    number, processes = state().process_index, state().num_processes
    own = list(items[number::processes])
    done = work(own) if own else []
    if processes == 1:
        return done
    results: dict[int, Result] = {}
    for first, part in enumerate(gather_object([done])):
        results |= zip(range(first, len(items), processes), part, strict=True)
    return [results[n] for n in range(len(items))]


def is_first() -> bool:
    """Tell whether this process is the one that writes."""
    return bool(state().is_main_process)
