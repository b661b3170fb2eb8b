"""The plain weights of packed matrices: made when somebody asks for one, compared with what is packed, packed again.

A model's packed matrix is the only copy in memory. Whoever reads a parameter gets the plain matrix, as a Parameter of
the layer: the checkpoint's own mapped memory where that is the same, else unpacked. While somebody may edit it, it is
kept; once it is found unchanged and nobody else holds it, it is dropped.

Knows matrices and parameters; knows no layer of the network and no kernel.
"""

import contextlib
import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .memory_pages import mapped_ranges, release
from .quantization import PackedMatrix

Pack = Callable[[Tensor], PackedMatrix | None]
MOST_UNPACKED = 1 << 28  # bytes that are handed out before those that nobody holds are dropped


class Watch:
    """What was reached from outside since the fast form last looked."""

    def __init__(self) -> None:
        self.reached = False  # a layer or a weight was asked for
        self.edited = False  # a weight was packed again
        self.handed_out: dict[int, PackedWeight] = {}
        self.lock = threading.RLock()  # held while weights are compared or lent
        self._lent: list[PackedWeight] | None = None  # to the fast form itself, while it runs the model's own code ...
        self._lent_to = 0  # ... in this thread

    def notice(self, weight: "PackedWeight | None" = None) -> None:
        """Somebody asked for a layer, or for this weight."""
        if not self.is_lending():
            self.reached = True
            if weight is not None:
                self.handed_out[id(weight)] = weight
        elif weight is not None and self._lent is not None:
            self._lent.append(weight)

    def is_lending(self) -> bool:
        return self._lent is not None and self._lent_to == threading.get_ident()

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """In this context the fast form asks, which edits nothing and holds nothing afterwards."""
        with self.lock:
            self._lent, self._lent_to = [], threading.get_ident()
            try:
                yield
            finally:
                for weight in self._lent:
                    if id(weight) not in self.handed_out:
                        weight.plain = None
                self._lent = None

    def take_over(self) -> None:
        """Pack again what was edited, and drop what nobody holds."""
        for weight in [*self.handed_out.values()]:
            weight.take_over()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        memo[id(self)] = twin = Watch()
        return twin

    def make_room(self) -> None:
        """Let a reader of all weights hold few of them at a time."""
        if sum(weight.unpacked_nbytes() for weight in self.handed_out.values()) > MOST_UNPACKED:
            self.take_over()


class PackedWeight:
    """A matrix of the model, packed, plain, or both."""

    def __init__(self, packed: PackedMatrix | None, pack: Pack, watch: Watch, mapped: Tensor | None = None):
        self.packed = packed  # None: `plain` is all there is
        self.pack = pack  # gives None for a matrix that cannot be packed, of another dtype or device
        self.watch = watch
        self.mapped = mapped  # the matrix in a file's mapped memory, if it lies there as it is
        self.is_shared = False  # whether a copy of the model reads that memory too, so that nobody may write to it
        self.shape = None if packed is None else packed.shape
        self.places = 0  # the layers in which it stands: 2 where an embedding is tied
        self.requires_grad = True
        self.plain: nn.Parameter | None = None  # while somebody may hold it
        self._own: int | None = None  # the address of the memory that was handed out

    def hand_out(self) -> nn.Parameter:
        """The plain matrix. `take_over` takes over its edits."""
        if self.plain is None:
            self.watch.make_room()
            self.plain = nn.Parameter(self._new_plain(), requires_grad=self.requires_grad)
            self._own = self.plain.data_ptr()
        self.watch.notice(self)
        return self.plain

    def _new_plain(self) -> Tensor:
        """The matrix in memory whose uses can be counted: with a storage of its own."""
        with torch.inference_mode(False), torch.no_grad():
            if self.mapped is not None and (self.watch.is_lending() or not self.is_shared):
                return torch.from_dlpack(self.mapped)
            return self.packed.unpack()  # type: ignore[union-attr]

    def unpacked_nbytes(self) -> int:
        """Bytes that the plain matrix takes, beside the file's mapped memory."""
        is_own = self.plain is not None and (self.mapped is None or self.is_shared)
        return self.plain.nbytes if is_own else 0  # type: ignore[union-attr]

    def replace(self, parameter: nn.Parameter) -> None:
        """Take somebody's own Parameter for the matrix."""
        self.plain, self._own = parameter, None
        self.watch.notice(self)

    def take_over(self) -> None:
        """Pack the plain matrix again if it was edited, and drop it if nobody else holds it."""
        if self.plain is None:
            return
        if self.packed is None or not self.packed.holds(self.plain.detach()):
            fits = self.plain.shape == self.shape
            self.packed, self.mapped, self.watch.edited = self.pack(self.plain.detach()) if fits else None, None, True
        if self.packed is not None and self._is_free():
            self.requires_grad, self.plain = self.plain.requires_grad, None
            del self.watch.handed_out[id(self)]
            if self.mapped is not None:
                release(self.mapped, mapped_ranges())

    def keep_plain(self) -> None:
        """Drop the packed matrix, since the plain one is trained."""
        self.hand_out()
        self.packed = self.mapped = None

    def _is_free(self) -> bool:
        """Whether `plain` is memory that was handed out here, and nobody else holds it or anything that hangs on it."""
        plain: Any = weakref.proxy(self.plain)
        hangs_on = plain.grad, plain._backward_hooks, plain._post_accumulate_grad_hooks
        is_ours = plain.data_ptr() == self._own or plain.untyped_storage().resizable()  # else maybe numpy's, or a file
        if not is_ours or plain.__dict__ or any(one is not None for one in hangs_on):
            return False
        return count_uses(self) == count_free_uses()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        self.take_over()
        twin = PackedWeight(copy.deepcopy(self.packed, memo), self.pack, copy.deepcopy(self.watch, memo))
        memo[id(self)] = twin
        if self.plain is None:  # else somebody may write to the mapped memory
            twin.mapped, twin.is_shared = self.mapped, True
            self.is_shared = True
        twin.requires_grad = self.requires_grad
        if twin.packed is None:
            twin.replace(copy.deepcopy(self.plain, memo))  # type: ignore[arg-type]
        return twin


def count_uses(weight: Any) -> tuple[int, int, int]:
    """How many hold `weight.plain`, how many its memory, and how many that as torch's storage."""
    storage = weight.plain.untyped_storage()
    return sys.getrefcount(weight.plain), torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


@functools.cache
def count_free_uses() -> tuple[int, int, int]:
    """`count_uses` of a parameter that nobody else holds."""
    return count_uses(SimpleNamespace(plain=nn.Parameter(torch.empty(1))))


class LazyParameters(dict[str, Any]):
    """A layer's `_parameters`, in which a PackedWeight stands for its plain matrix, which whoever reads it gets."""

    def __init__(self, parameters: dict[str, Any]):
        super().__init__(parameters)
        self._packed: dict[str, PackedWeight] = {}  # by name; kept while another tensor stands in its place

    def packed(self, name: str) -> PackedWeight | None:
        weight = super().get(name)
        return weight if isinstance(weight, PackedWeight) else None

    def lay(self, name: str, weight: PackedWeight) -> None:
        """Let `weight` stand for the parameter of this name."""
        self._packed[name] = weight
        weight.places += 1
        super().__setitem__(name, weight)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value.hand_out() if isinstance(value, PackedWeight) else value

    def __setitem__(self, name: str, value: Any) -> None:
        weight = self._packed.get(name)
        if weight is None or not isinstance(value, nn.Parameter):
            super().__setitem__(name, value)
        elif value is weight.plain:
            super().__setitem__(name, weight)
        elif weight.places == 1:
            weight.replace(value)
            super().__setitem__(name, weight)
        else:  # tied to another layer, which keeps its own
            weight.places -= 1
            twin = PackedWeight(None, weight.pack, weight.watch)
            twin.shape = weight.shape
            twin.replace(value)
            self.lay(name, twin)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if dict.__contains__(self, name) else default

    def pop(self, name: str, *default: Any) -> Any:
        value = super().pop(name, *default)
        return value.hand_out() if isinstance(value, PackedWeight) else value

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return _Items(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return _Values(self)

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyParameters":
        twin = LazyParameters({})
        for name in self:
            value = copy.deepcopy(dict.__getitem__(self, name), memo)
            if isinstance(value, PackedWeight):
                twin.lay(name, value)
            else:
                dict.__setitem__(twin, name, value)
        return twin

    def __reduce__(self) -> Any:
        """Pickled as plain parameters."""
        return dict, (self.copy(),)


class _Items(ItemsView[str, Any]):
    """One plain matrix at a time: a reader of all of them holds one."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((name, self._mapping[name]) for name in self._mapping)  # type: ignore[attr-defined]


class _Values(ValuesView[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (self._mapping[name] for name in self._mapping)  # type: ignore[attr-defined]


def lazy(module: nn.Module, name: str, weight: PackedWeight) -> None:
    """Let `weight` stand for the parameter of this name."""
    parameters = LazyParameters(module._parameters)
    parameters.lay(name, weight)
    module._parameters = parameters
