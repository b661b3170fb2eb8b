"""The layers of a model as they were when its fast form was made, and whether they still are.

A model whose layers were replaced, hooked, or given another forward runs its plain text. Looking is cheap, and is done
only after somebody reached inside.

Knows modules; knows no weights and no kernels.
"""

import operator
import sys
from collections.abc import ItemsView, Iterator, ValuesView
from itertools import chain
from typing import Any

from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn
from torch.nn.modules import module as torch_module

from ..model import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock
from .plain_weights import Watch

CLASSES = (
    *(nn.Module, nn.Identity, nn.ModuleList, ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding),
    *(Attention, FeedForward, RMSNorm, Transformer, TransformerBlock),
)
METHODS = ("__call__", "forward", "_norm", "caches", "attend", "weigh", "run", "prepare")
TEXT = [(vars(cls), name, vars(cls)[name]) for cls in CLASSES for name in METHODS if name in vars(cls)]
# Whether these were replaced before this file was imported.
IS_FIRST = all(
    vars(cls)[name].__qualname__ == f"{cls.__qualname__}.{name}"
    for cls in CLASSES
    for name in METHODS[1:]
    if cls is not nn.Module and name in vars(cls)
)
GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
# What a layer computes by, beside its parts and parameters.
SETTINGS = (
    *("eps", "window", "head_dim", "n_local_heads", "n_local_kv_heads", "n_rep"),
    *("gather_output", "input_is_parallel", "vocab_start_index", "vocab_end_index"),
)


class NoticedModules(dict[str, Any]):
    """A model's `_modules`, which tells `watch` when somebody asks for one of them."""

    def __init__(self, modules: dict[str, Any], watch: Watch):
        super().__init__(modules)
        self.watch = watch

    def __getitem__(self, name: str) -> Any:
        self.watch.notice()
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.watch.notice()
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.watch.notice()
        super().__delitem__(name)

    def __iter__(self) -> Iterator[str]:
        self.watch.notice()
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if dict.__contains__(self, name) else default

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self.watch.notice()
        return super().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self.watch.notice()
        return super().values()

    def __reduce__(self) -> Any:
        """Pickled, and copied, as what it holds."""
        return dict, (dict(self.items()),)


def text_is_original() -> bool:
    """Whether no forward of the network's classes was replaced, and no hook is on all modules there are."""
    return IS_FIRST and not any(GLOBAL_HOOKS) and all(names.get(name) is value for names, name, value in TEXT)


class Structure:
    """The modules inside a model, what they are made of, and how many hold them."""

    def __init__(self, model: nn.Module, untouched: "Structure | None" = None):
        """untouched: that of the model that this one is a copy of."""
        inner = list(chain.from_iterable(child.modules() for child in dict.values(model._modules) if child))
        self._modules = inner
        self._names = [vars(module) for module in inner]
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [names[kind] for names in self._names for kind in hooks]
        self._parents = [model._modules, *(module._modules for module in inner if module._modules)]
        self._children = [*chain.from_iterable(map(dict.values, self._parents))]
        self._settings = [(names, name) for names in self._names for name in SETTINGS if name in names]
        self._expected: tuple[Any, ...] = self._read() if untouched is None else untouched._expected
        self._holders = [*map(sys.getrefcount, inner)] if untouched is None else None

    def _read(self) -> tuple[Any, ...]:
        """How many attributes each module has, what class it is, and the settings."""
        values = [names.get(name) for names, name in self._settings]
        return [*map(len, self._names)], [*map(type, self._modules)], values

    def holds(self) -> bool:
        """Whether every layer still is what it was, without hooks, and computes by the same text."""
        children = [*chain.from_iterable(map(dict.values, self._parents))]
        same_children = len(children) == len(self._children) and all(map(operator.is_, children, self._children))
        return same_children and not any(self._hooks) and self._read() == self._expected

    def is_held(self) -> bool:
        """Whether somebody outside of the model may hold one of its layers."""
        return self._holders is None or [*map(sys.getrefcount, self._modules)] != self._holders
