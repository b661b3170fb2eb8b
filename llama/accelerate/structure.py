"""The layers of a model as they were when its fast form was made, and whether they still are.

A model whose layers were replaced, hooked, or given another forward runs its own code. Looking is cheap, and is done
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
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from .. import model
from ..model import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock
from .plain_weights import Watch

CLASSES = (
    *(nn.Module, nn.Identity, nn.ModuleList, ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding),
    *(Attention, FeedForward, RMSNorm, Transformer, TransformerBlock),
)
CALLED = ("__call__", "_call_impl", "forward")  # of every module, by whichever class has them
METHODS = ("_norm", "caches", "attend", "weigh", "run", "prepare")
FUNCTIONS = (
    *((vars(model), name) for name in ("apply_rotary_emb", "repeat_kv")),
    *((vars(F), name) for name in ("linear", "silu", "embedding", "scaled_dot_product_attention")),
)
PLACES = [
    *((vars(cls), name) for cls in CLASSES for name in (*CALLED, *METHODS) if name in CALLED or name in vars(cls)),
    *FUNCTIONS,
]
GETTERS = [(names.get, name) for names, name in PLACES]  # looked at in every step of a stream
TEXT = [get(name) for get, name in GETTERS]
# Whether these were replaced before this file was imported.
IS_FIRST = all(
    vars(cls)[name].__qualname__ == f"{cls.__qualname__}.{name}"
    for cls in CLASSES
    for name in ("forward", *METHODS)
    if cls is not nn.Module and name in vars(cls)
)
GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
INNER = (*HOOKS, "_modules", "_parameters")  # the dicts of a module
# What a layer computes by, beside its parts and parameters.
LAYER_SETTINGS = (
    *("eps", "window", "head_dim", "n_local_heads", "n_local_kv_heads", "n_rep"),
    *("gather_output", "input_is_parallel", "vocab_start_index", "vocab_end_index", "max_norm", "padding_idx"),
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
    return IS_FIRST and not any(GLOBAL_HOOKS) and are_same([get(name) for get, name in GETTERS], TEXT)


def is_original(network: nn.Module) -> bool:
    """Whether a network that has no fast form is made of the classes here, as they were, without hooks."""
    modules = [network, *list_modules(network)]
    known = type(network) is Transformer and all(type(module) in (*CLASSES, nn.Linear) for module in modules)
    replaced = any(name in vars(module) for module in modules for name in (*CALLED, *METHODS))
    return known and text_is_original() and not replaced and not has_hooks(modules)


class Structure:
    """The modules inside a model, what they are made of, and how many hold them."""

    def __init__(self, model: nn.Module, is_copy: bool = False):
        """is_copy: whether somebody may hold modules of the model already."""
        self._modules = list_modules(model)
        self._names = [vars(module) for module in self._modules]
        self._inner = [names[kind] for names in self._names for kind in INNER]
        self._parents = [model._modules, *(module._modules for module in self._modules if module._modules)]
        self._children = [*chain.from_iterable(map(dict.values, self._parents))]
        self.expected = read_modules(self._modules)
        self._holders = None if is_copy else self._count_holders()

    def _count_holders(self) -> list[int]:
        return [*map(sys.getrefcount, self._modules), *map(sys.getrefcount, self._inner)]

    def holds(self) -> bool:
        """Whether every layer still is what it was, without hooks, and computes by the same text."""
        inner = [names.get(kind) for names in self._names for kind in INNER]
        children = [*chain.from_iterable(map(dict.values, self._parents))]
        return (
            are_same(inner, self._inner)
            and are_same(children, self._children)
            and not has_hooks(self._modules)
            and read_modules(self._modules) == self.expected
        )

    def is_held(self) -> bool:
        """Whether somebody outside of the model may hold one of its layers, or what a layer consists of."""
        return self._holders is None or self._count_holders() != self._holders


def list_modules(model: nn.Module) -> list[nn.Module]:
    """Those inside the model, without a look at them that `NoticedModules` would tell."""
    return list(chain.from_iterable(child.modules() for child in dict.values(model._modules) if child))


def has_hooks(modules: list[nn.Module]) -> bool:
    return any(vars(module)[kind] for module in modules for kind in HOOKS)


def read_modules(modules: list[nn.Module]) -> list[Any]:
    """The class of each module, the names of its attributes, and the settings."""
    attributes = [vars(module) for module in modules]
    settings = [[own.get(name) for name in LAYER_SETTINGS] for own in attributes]
    return list(zip(map(type, modules), map(tuple, attributes), settings, strict=True))


def are_same(actual: list[Any], expected: list[Any]) -> bool:
    return len(actual) == len(expected) and all(map(operator.is_, actual, expected))
