"""A device that is not there, in place of a GPU: tensors say that they are on it, and to mix them with the CPU's is an
error, as on a GPU. Their numbers are worked out on the CPU, so that a run has the same on either."""

import contextlib
from types import ModuleType

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, ELSEWHERE = torch.device("cpu"), torch.device("lazy")  # a type whose backward pass stays in the calling thread
aten = torch.ops.aten
# For what a GPU takes tensors of both: copies; indices of its own; single numbers, but not among those to be joined.
COPIES, JOINS = {aten._to_copy, aten.copy_}, {aten.cat, aten.stack}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class There(torch.Tensor):
    """A tensor on ELSEWHERE; `here` has its numbers."""

    @staticmethod
    def __new__(cls, here):
        kept = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=ELSEWHERE, **kept)

    def __init__(self, here):
        self.here = here

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """An operation, on the CPU, with results where they belong."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    packet = function.overloadpacket
    here = [tuple(x.shape) for x in tensors if not isinstance(x, There) and (x.dim() > 0 or packet in JOINS)]
    allowed = packet in COPIES or (packet in INDEXED and isinstance(args[0], There))
    if there and here and not allowed:
        raise RuntimeError(f"{function} is given tensors of the CPU, {here}, beside those of another device")
    device = torch.device(kwargs.get("device") or (ELSEWHERE if there else CPU))
    if packet == aten.copy_:
        device = ELSEWHERE if isinstance(args[0], There) else CPU
    kwargs = kwargs | ({"device": CPU} if "device" in kwargs else {})
    changed_in_place = {id(x.here): x for x in there}
    args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))

    def place(x):
        if not isinstance(x, torch.Tensor) or device != ELSEWHERE:
            return x
        return changed_in_place[id(x)] if id(x) in changed_in_place else There(x)

    return tree_map(place, function(*args, **kwargs))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Factories(TorchFunctionMode):
    """Of tensors that are filled before an operation is seen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.as_tensor, torch.tensor) and torch.device(kwargs.get("device") or CPU) == ELSEWHERE:
            return function(*args, **kwargs | {"device": None}).to(ELSEWHERE)
        return function(*args, **kwargs)


class Torch(ModuleType):
    """PyTorch with a GPU: ELSEWHERE."""

    cuda = ModuleType("cuda")
    cuda.is_available = lambda: True

    def __getattr__(self, name):
        return getattr(torch, name)

    def device(self, name):
        return ELSEWHERE if name == "cuda" else torch.device(name)

    def save(self, contents, file):
        torch.save(tree_map(lambda x: x.here if isinstance(x, There) else x, contents), file)


@contextlib.contextmanager
def elsewhere(script):
    """In here the script finds a GPU."""
    supported = torch_optimizer._get_fused_kernels_supported_devices() + [ELSEWHERE.type]
    with pytest.MonkeyPatch.context() as patch, Operations(), Factories():
        patch.setattr(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: supported)
        patch.setattr(script, "torch", Torch("torch"))
        yield
