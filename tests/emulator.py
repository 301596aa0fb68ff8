"""A CUDA device that a CPU plays: what a script does with one is checked where there is none.

Tensors of the device "emulated" keep their data in host memory, behind a wrapper that nothing but the device can open.
What can go wrong on CUDA without a word, or only there, goes wrong here at once:

- An operation on tensors of both sides is an error, as on CUDA.
- A graph records operations with the memory they use, executes none of them, and repeats these and nothing else:
  Python is not run again, numbers stay as they were, and memory that only the recording has filled is overwritten.
- In a recording, to read a value on the host, or to make a tensor whose shape depends on values, is an error.
- A copy to pinned memory arrives when the host waits for the device, and not before; until then there is NaN.
- A copy from pinned memory needs it unchanged until the host waits; that it was is checked then.
- To use a stream that has not waited for what another one has done is an error.

Random numbers are those of the CPU's generator, so that a run must end with the numbers of a run on the CPU. What this
cannot show: CUDA's kernels and their rounding, memory that a graph uses and the script has freed, torch.compile, NCCL,
speed.
"""

import contextlib
import sys
import types
import weakref
from pathlib import Path
from typing import ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class DeviceTensor(torch.Tensor):
    """A tensor of the device; `memory` is its data, a tensor of the CPU with the same shape and strides."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory):
        layout = {"strides": memory.stride(), "storage_offset": memory.storage_offset(), "dtype": memory.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, memory.size(), device="emulated:0", **layout)
        tensor.memory = memory
        return tensor

    def __repr__(self):
        return f"DeviceTensor({self.memory})"

    def tolist(self):  # which PyTorch has for its own tensors only
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # torch.save
        Emulation.current.wait("torch.save")
        return self.memory.clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, _, args=(), kwargs=None):
        return Emulation.current.dispatch(func, args, kwargs or {})


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def on_device(device):
    return device is not None and torch.device(device).type == "emulated"


class Emulation(TorchDispatchMode):
    """The device, which is there while this is entered."""

    current = None

    def __init__(self):
        super().__init__()
        self.pinned = {}  # by address; never dropped, so that no address is used twice
        self.to_arrive, self.to_stay = [], []  # copies to pinned memory, and the pinned memory that copies read
        self.graph = None  # that records

    def __enter__(self):
        Emulation.current, self.lifting = self, torch._C._only_lift_cpu_tensors()
        self.streams, self.stream = [], None
        self.stream = Stream()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=...) is a copy from the host, as on CUDA
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.lifting)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        return self.dispatch(func, args, kwargs or {})

    def wait(self, what):
        """The host waits until the device has done everything."""
        if self.graph:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        for memory, content in self.to_stay:
            if memory.numpy().tobytes() != content:
                raise RuntimeError("the host has written to pinned memory that a copy had yet to read")
        for memory, content in self.to_arrive:
            memory.copy_(content)
        self.to_arrive, self.to_stay = [], []
        for other in self.streams:
            other.behind.discard(self.stream)

    def use_stream(self):
        """The current stream does something, which the others have not waited for yet."""
        if self.stream.behind:
            raise RuntimeError("a stream has not waited for another one's work")
        for other in self.streams:
            if other is not self.stream:
                other.behind.add(self.stream)

    def launch(self, operation, reads=(), writes=()):
        """Execute an operation now; in a recording, only to learn of its memory."""
        if self.graph:
            self.graph.keep(reads, writes)
        else:
            self.use_stream()
        result = operation()
        if self.graph:
            self.graph.record(operation, result)
        return result

    def dispatch(self, func, args, kwargs):
        """Any operation of PyTorch, of whatever tensors."""
        leaves = tree_leaves((args, kwargs))
        name, target = func._schema.name, kwargs.get("device")
        ours = [x for x in leaves if isinstance(x, DeviceTensor)]
        theirs = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor)]
        if name == "aten::copy_" and ours and theirs:
            return self.copy(args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        if name == "aten::_to_copy" and target is not None and on_device(target) != bool(ours):
            source = args[0]
            rest = {key: value for key, value in kwargs.items() if key == "memory_format"}
            layout = torch.empty_like(source.memory if ours else source, dtype=kwargs.get("dtype"), **rest)
            if ours and kwargs.get("non_blocking"):
                self.pinned[address(layout)] = layout
            return self.copy(DeviceTensor(layout) if theirs else layout, source, kwargs.get("non_blocking", False))
        if not ours and not on_device(target):
            if kwargs.get("pin_memory"):
                result = func(*args, **kwargs | {"pin_memory": False})
                self.pinned[address(result)] = result
                return result
            return func(*args, **kwargs)
        if theirs and (name in ("aten::cat", "aten::stack", "aten::where") or any(x.dim() for x in theirs)):
            raise RuntimeError(f"{name}: tensors of the device and of the host")
        if name in ("aten::index", "aten::index_put_"):
            waits = any(x is not None and x.dtype == torch.bool for x in tree_leaves(args[1]))
        else:
            waits = name in ("aten::equal", "aten::allclose") or not WAITS.isdisjoint(func.tags)
        if waits:
            self.wait(name)
        return self.compute(func, args, kwargs)

    def compute(self, func, args, kwargs):
        """On the device."""
        host_args, host_kwargs = tree_map_only(DeviceTensor, lambda x: x.memory, (args, kwargs))
        if on_device(kwargs.get("device")):
            host_kwargs["device"] = torch.device("cpu")
        if self.graph:  # a number in host memory is frozen
            known = {id(x.memory) for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor)}
            host_args, host_kwargs = tree_map_only(
                torch.Tensor, lambda x: x if id(x) in known else x.clone(), (host_args, host_kwargs)
            )
        reduction = func.namespace == "c10d"  # between processes
        signature = func._schema.arguments
        given = dict(zip((argument.name for argument in signature), host_args, strict=False)) | host_kwargs
        written = [a.name for a in signature if a.alias_info and a.alias_info.is_write and a.name in given]
        reads = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        writes = [x for x in tree_leaves([given[name] for name in written]) if x is not None]

        def operation():
            result = func(*host_args, **host_kwargs)
            if reduction:
                result[1].wait()
            return result

        result = self.launch(operation, reads, reads if reduction else writes)
        if not any(isinstance(x, torch.Tensor) for x in tree_leaves(result)):
            return result
        wrapped = tree_map_only(torch.Tensor, DeviceTensor, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def copy(self, to, source, non_blocking):
        """Between device and host."""
        if isinstance(to, DeviceTensor):
            pinned = address(source) in self.pinned
            if not non_blocking or (self.graph and not pinned):
                self.wait("copy to the device")

            def operation():
                to.memory.copy_(source)
                if pinned and non_blocking:
                    self.to_stay.append((source, source.numpy().tobytes()))

            self.launch(operation, writes=[to.memory])
        else:
            if not (address(to) in self.pinned and non_blocking):
                self.wait("copy to the host")
                to.copy_(source.memory)
                return to

            def operation():
                self.to_arrive.append((to, source.memory.clone()))
                to.fill_(torch.nan if to.is_floating_point() else 1)

            self.launch(operation, [source.memory], [to])
        return to


class Graph:
    """torch.cuda.CUDAGraph."""

    alive: ClassVar = weakref.WeakSet()

    def __init__(self):
        self.operations, self.outside, self.before, self.inside = [], set(), {}, {}
        Graph.alive.add(self)

    def keep(self, reads, writes):
        """What was there before the recording stays as it was."""
        for memory in [*reads, *writes]:
            if address(memory) not in self.inside:
                self.outside.add(address(memory))
        for memory in writes:
            if address(memory) in self.outside and address(memory) not in self.before:
                storage = memory.untyped_storage()
                self.before[address(memory)] = storage, storage.clone()

    def record(self, operation, result):
        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        for memory in results:
            if address(memory) not in self.outside:
                self.inside.setdefault(address(memory), memory)
        self.operations.append((operation, results))

    @contextlib.contextmanager
    def recording(self):
        device, generator = Emulation.current, torch.get_rng_state()
        device.wait("the beginning of a recording")
        device.graph = self
        try:
            yield
        finally:
            device.graph, device.to_arrive, device.to_stay = None, [], []
        torch.set_rng_state(generator)
        for storage, content in self.before.values():
            storage.copy_(content)
        for memory in self.inside.values():
            memory.fill_(torch.nan if memory.is_floating_point() else 1)

    def replay(self):
        Emulation.current.use_stream()
        for operation, results in self.operations:
            new_results = [x for x in tree_leaves(operation()) if isinstance(x, torch.Tensor)]
            for memory, new in zip(results, new_results, strict=True):
                if address(memory) != address(new):
                    memory.copy_(new)


class Stream:
    """torch.cuda.Stream; `behind` are those that have done something for which it has not waited."""

    def __init__(self, device=None):
        self.behind = {Emulation.current.stream} - {None}
        Emulation.current.streams.append(self)

    def wait_stream(self, stream):
        self.behind.discard(stream)

    def synchronize(self):
        Emulation.current.wait("synchronize")


@contextlib.contextmanager
def on_stream(stream):
    device = Emulation.current
    before, device.stream = device.stream, stream
    try:
        yield
    finally:
        device.stream = before


def check_capturable(optimizer, *_):
    """What PyTorch checks on CUDA only."""
    if Emulation.current and Emulation.current.graph:
        assert all(group["capturable"] for group in optimizer.param_groups), "capturable=False while capturing"


register_optimizer_step_pre_hook(check_capturable)

cuda = types.ModuleType("torch.emulated")  # what the scripts use of torch.cuda
cuda.is_available = cuda.is_initialized = lambda: True
cuda._is_in_bad_fork = lambda: False
cuda.chosen = []
cuda.manual_seed_all, cuda.set_device = lambda _: None, cuda.chosen.append
cuda.device_count, cuda.current_device = lambda: 2, lambda: 0  # one for each rank of a test
cuda.get_device_name = lambda device=None: "emulated"
cuda.get_rng_state = lambda device=None: torch.get_rng_state()
cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
cuda.Stream, cuda.CUDAGraph = Stream, Graph
cuda.current_stream = lambda device=None: Emulation.current.stream
cuda.stream = on_stream
cuda.graph = lambda graph, stream=None: graph.recording()
cuda.synchronize = lambda device=None: Emulation.current.wait("synchronize")
_setup_privateuseone_for_python_backend("emulated", cuda)


def load_emulated(path, changes=()):
    """A script that takes the emulated device for CUDA, with (old, new) changes of its text."""
    source = Path(path).read_text()
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    for name, emulated in (("torch.cuda.", "torch.emulated."), ('"cuda"', '"emulated"'), (".is_cuda", ".is_emulated")):
        source = source.replace(name, emulated)
    module = types.ModuleType(f"emulated_{Path(path).stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module
