"""A GPU that is none: its tensors say that they are on `cuda`, are computed by the CPU, and meet no tensor of the CPU.

Run     python -m tests.pretended_gpu pipeline.unlearn MODEL OUT FORGET_DIR RETAIN_DIR

runs a stage as on a machine with one GPU. What it finds are tensors and generators left on the wrong device: as CUDA
does, it refuses an operation on tensors of both, but for copies, numbers (no dimensions) and indices. Nothing is learnt
about the kernels of a GPU, its rounding, its memory or its speed.

A tensor there is an empty shell of a device that torch knows by name alone, with a tensor of the CPU in it; `device`
is the shell's own word. Operations reach it by `__torch_dispatch__`; the modes see to what begins without a tensor
(`torch.zeros(device=...)`) or ends outside of torch (`tolist`).
"""

import atexit
import runpy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
GPU, SHELL, CPU = torch.device("cuda", 0), torch.device("pretended", 0), torch.device("cpu")

MEMORY = 80 << 30
COPIES = {"aten::copy_", "aten::_to_copy", "aten::to"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}
Generator = torch.Generator


def on_gpu(device: Any) -> bool:
    """Tell whether a device, by whatever name, is the pretended one."""
    return device is not None and torch.device(device).type in (GPU.type, SHELL.type)


class Shell(Tensor):
    """A tensor on the pretended GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Shell":
        """Pretend that a tensor of the CPU is on the GPU."""
        shell: Shell = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=SHELL,
        )
        shell.inner = inner
        return shell

    device = GPU
    is_cuda = True

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation that has a shell among its arguments."""
        return compute(operation, args, kwargs or {})


class GpuGenerator(Generator):
    """Random numbers of the pretended GPU; they are the CPU's."""

    device = GPU


class AnyGenerator(Generator):
    """What `torch.Generator` is: of whichever device."""

    def __new__(cls, device: Any = CPU) -> Any:
        return GpuGenerator() if on_gpu(device) else Generator(device)


def asked_for(args: Any, kwargs: Any) -> torch.device | None:
    """Return the device that an operation is to give its result on, if it is told."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)), None)


computed = 0  # operations on the pretended GPU


def compute(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on what is in the shells. Its results are shells if it was asked for, or given, any."""
    global computed
    computed += 1
    name = operation._schema.name
    # CUDA takes indices from the CPU, the values that it puts there not.
    given = tree_leaves((args[0], args[2:3]) if name in INDEXED else (args, kwargs))
    shells = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Shell)]
    others = [value for value in given if isinstance(value, Tensor) and not isinstance(value, Shell) and value.dim()]
    if shells and others and name not in COPIES:
        raise RuntimeError(f"{name}: expected all tensors on one device, found {GPU} and {others[0].device}")
    asked = asked_for(args, kwargs)
    there = on_gpu(asked) if asked is not None else bool(shells)
    if name == "aten::copy_":
        there = isinstance(args[0], Shell)

    def open_(value: Any) -> Any:
        if isinstance(value, torch.device) and on_gpu(value):
            return CPU
        return value.inner if isinstance(value, Shell) else value

    same = {id(shell.inner): shell for shell in shells}  # what an operation in place returns

    def close(value: Any) -> Any:
        if not isinstance(value, Tensor) or not there:
            return value
        return same[id(value)] if id(value) in same else Shell(value)

    return tree_map(close, operation(*tree_map(open_, tuple(args)), **tree_map(open_, dict(kwargs))))


class Operations(TorchDispatchMode):
    """Operations that have no tensor among their arguments, but are to give some on the GPU."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run: Callable[..., Any] = operation
        return compute(operation, args, kwargs) if on_gpu(asked_for(args, kwargs)) else run(*args, **kwargs)


class Calls(TorchFunctionMode):
    """Calls that torch would decide by its own knowledge of devices, or that need more than an operation."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def place(value: Any) -> Any:
            named = isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] == GPU.type)
            return SHELL if named and on_gpu(value) else value

        args, kwargs = tree_map(place, tuple(args)), tree_map(place, dict(kwargs or {}))
        generator, there = kwargs.get("generator"), kwargs.get("device") == SHELL
        if generator is not None and isinstance(generator, GpuGenerator) != there:
            raise RuntimeError(f"{call.__name__}: a generator of one device, and a tensor of the other")
        if there and (generator is not None or call in (torch.tensor, torch.as_tensor)):
            return call(*args, **{**kwargs, "device": CPU}).to(SHELL)
        if call is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], SHELL if isinstance(args[1], Shell) else args[1].device, args[1].dtype, *args[2:])
        if args and isinstance(args[0], Shell):
            if call == Tensor.data.__set__:  # type: ignore[attr-defined]
                args[0].inner = args[1].inner
            if call in (Tensor.tolist, Tensor.untyped_storage, Tensor.data_ptr):
                return call(args[0].inner)
            if call in (Tensor.__getitem__, Tensor.__setitem__):
                places = args[1] if isinstance(args[1], tuple) else (args[1],)
                args = (args[0], tuple(torch.tensor(n) if isinstance(n, list) else n for n in places), *args[2:])
        return call(*args, **kwargs)


def install() -> None:
    """Make this process see one GPU, to its end."""
    torch.Generator = AnyGenerator  # type: ignore[misc]
    torch.accelerator.current_accelerator = lambda check_available=False: GPU
    torch.cuda.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    Calls().__enter__()
    Operations().__enter__()
    from pipeline.lib.processes import state  # it imports accelerate, which is to see the above

    state().device = GPU
    atexit.register(lambda: print(f"{computed} operations on the pretended GPU", file=sys.stderr))


def main(words: Iterable[str]) -> None:
    """Run a module with its command line."""
    install()
    sys.argv = list(words)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
