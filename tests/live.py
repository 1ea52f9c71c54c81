"""How many bytes of tensors live at once, seen from outside: the reference that memory.py is held against."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.core.environment import quiet_profiler


class LiveBytes(TorchDispatchMode):
    """Counts each storage from the operation that makes it to the moment when it is freed.

    `live` is now, `peak` the most so far. What was there before isn't counted, nor what an operation holds only inside
    itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs)):  # unknown yet: made before
            self._meet(tensor.untyped_storage(), 0)
        for tensor in _tensors(result):
            self._meet(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def saved_bytes(run: Callable[[], torch.Tensor], ignore: Iterable[torch.Tensor]) -> int:
    """The bytes that autograd keeps for the backward pass of what `run()` computes, each storage once, without those
    of `ignore` (weights, shared inputs)."""
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(run())
    for tensor in ignore:
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values())


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held for `run()` at once, as the profiler saw each of its calls; what
    operations hold inside themselves counts too. What was there before isn't counted when it is freed: the profiler
    takes it for what an earlier profile saw at its address."""
    quiet_profiler()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    held: dict[int, int] = {}  # address -> bytes
    live = peak = 0
    for event in sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree())):  # type: ignore[union-attr]
        _, address, size = event
        if size > 0:
            held[address] = size
            live += size
        else:
            live -= held.pop(address, 0)
        peak = max(peak, live)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(nanoseconds, address, bytes or minus bytes) of each call of the allocator, as the profiler orders them."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)
