"""The fast form of a built model: where it is entered, and how it takes over what was edited in the model.

`Transformer.fast` is one. The model stays what it is: its layers compute by the code of model.py when they are called
by hand, hooked or replaced, and whoever reads a packed weight gets the plain one. After somebody has reached inside,
the model is compared with what was packed when a public method or a stream begins, and at each forward by hand.

Knows the network and its packed weights; knows no files and no generation.
"""

import copy
import functools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._util.device import DTYPES
from ..kv_cache import Pass
from ..model import Transformer
from .call_capture import CaptureFunction, GraphCapture, capture_calls
from .decode_steps import DecodeSteps
from .kernels import dispatch
from .layers import FastNetwork
from .plain_weights import PackedWeight, Watch
from .quantization import PackedMatrix
from .shared_memory import SharedMemory
from .structure import NoticedModules, Structure, has_hooks, list_modules, read_modules, text_is_original

ChooseCapture = Callable[[torch.device, bool], CaptureFunction | None]  # by device, and whether attention is a kernel
ParameterPlace = tuple[dict[str, Any], str]  # a layer's `_parameters`, and a name in it
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


class FastModel:
    """A Transformer's fast form."""

    def __init__(
        self,
        model: Transformer,
        watch: Watch,
        shared: SharedMemory | None,
        compile: bool,
        choose_capture: ChooseCapture | None = None,
        is_copy: bool = False,
    ):
        """compile: see `Acceleration`. is_copy: whether somebody may hold layers of the model already."""
        self.model, self.watch = model, watch
        self.usable = True  # whether the model's layers still are those that were packed
        self.is_settled = False
        self._looks = 0  # how often it was compared with the model since somebody could have edited that
        self._shared, self._compile = shared, compile
        self._choose_capture = choose_capture or capture_of_device
        self.steps: DecodeSteps | None = None
        self._build()
        model._modules = NoticedModules(model._modules, watch)
        self.structure = Structure(model, is_copy)
        self.forms = read_forms(self._vectors())

    def _build(self) -> None:
        """Read the parts of the model as they are now. What was captured of others is forgotten."""
        if self.steps is not None:
            self.steps.close()
        self.network = FastNetwork(self.model, self._shared)
        self.device, self.dtype = self.network.like.device, self.network.like.dtype
        self._places = list_places(self.model)
        self._parameters = self._plain_parameters()
        weights = self._weights()
        self._all_mapped = bool(weights) and all(weight.mapped is not None for weight in weights)
        self.steps = self._make_steps()

    def _make_steps(self) -> DecodeSteps | None:
        """The decode steps of this device, if they are captured or compiled.

        Where calls are captured, compile=True captures too, which is faster: compiled code would call the same kernels
        through torch's dispatcher.
        """
        if self.dtype not in DTYPES.values():
            return None
        capture = self._choose_capture(self.device, self.network.attends)
        if capture is None and not self._compile:
            return None
        steps = DecodeSteps(self.network, self.model.params, self._compile and capture is not capture_calls)
        if capture is not None:
            steps.capture_by(capture)
        return steps

    # --- where it is entered ------------------------------------------------------------------------------------------

    def is_usable(self) -> bool:
        return self.usable and not torch.is_grad_enabled() and not torch.is_autocast_enabled(self.device.type)

    def forward(self, inputs: Pass, hidden: list[Tensor] | None = None) -> Tensor:
        """Logits. Of several tokens by the model's own code, to its last bit, where that takes no memory.

        hidden: as in `Transformer.run`.
        """
        if inputs.tokens.shape[1] > 1 and self._all_mapped:
            with self.watch.lend():
                return self.model.output(self.model.run(inputs, hidden)).float()
        return self.logits(self.hidden_states(inputs, hidden))

    def hidden_states(self, inputs: Pass, hidden: list[Tensor] | None = None) -> Tensor:
        seqlen = inputs.tokens.shape[1]
        if self.steps is not None and inputs.start_pos is not None and seqlen == 1 and hidden is None:
            return self.steps(inputs)
        masks: tuple[Tensor | None, Tensor | None] = (None, None)
        if inputs.start_pos is None or not (self.network.attends and dispatch.can_attend(self.network.like, seqlen)):
            masks = inputs.mask(), inputs.mask(self.model.params.sliding_window)
        return self.network.run(
            inputs.tokens, inputs.start_pos, inputs.freqs_cis, *masks, hidden=hidden, slots=inputs.slots
        )

    def warm_up(self) -> None:
        """With compile, make the decode steps of all sizes of batch; they write to the engine's first slots."""
        if self._compile and self.steps is not None:
            self.steps.warm_up(self.model.prepare)

    def logits(self, h: Tensor) -> Tensor:
        return self.network.output(h).float()

    @property
    def packed_matrices(self) -> list[PackedMatrix]:
        return [weight.packed for weight in self._weights() if weight.packed is not None]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads on this rank: matrices, norms and biases."""
        linears = [self.network.output, *(linear for _, linear in self.network.linears)]
        vectors = {id(vector): vector.nbytes for vector in self._vectors() if vector.ndim == 1}
        return sum(linear.nbytes for linear in linears) + sum(vectors.values())

    # --- what was edited ----------------------------------------------------------------------------------------------

    def refresh(self, trains: bool = False) -> None:
        """Take over what was edited since the last call. Costs next to nothing if nobody reached inside.

        trains: whether the plain weights are to be trained.
        """
        if self.is_settled:
            return
        self._looks += trains or self.watch.reached
        if not text_is_original() or type(self.model) is not Transformer or "run" in vars(self.model):
            self.usable, self.watch.reached = False, True
        elif trains or self.watch.reached:
            with self.watch.lock:
                self._unpack_for_training() if trains else self._compare()

    @property
    def version(self) -> object:
        """Equal to an earlier one only if nobody could have edited the model in between. Call `refresh` before."""
        if not self.usable:
            return object()
        return self._looks, [
            read_numbers(vector) for vector in self._vectors()
        ]  # who holds one's memory leaves no trace

    def _compare(self) -> None:
        """Look at what may have been edited, and make the fast form anew where it was."""
        self.usable = self.structure.holds() and read_forms(self._vectors()) == self.forms
        if self.usable:
            self.watch.take_over()
            self.usable = all(weight.packed is not None for weight in self._weights())
        if self.usable and (self.watch.edited or self._plain_parameters() != self._parameters):
            self._build()
            self.watch.edited = False
        elif self.usable and self.steps is not None:
            self.steps.forget_other_caches()
        is_held = bool(self.watch.handed_out) or self.structure.is_held() or self._vectors_are_held()
        self.watch.reached = not self.usable or is_held

    def _unpack_for_training(self) -> None:
        """Keep the plain weights alone, which are trained; they are packed when the fast form is next to run."""
        for weight in self._weights():
            weight.keep_plain()
        self.usable, self.watch.reached = False, True

    def _weights(self) -> list[PackedWeight]:
        values = [dict.get(own, name) for own, name in self._places]
        return list({id(value): value for value in values if isinstance(value, PackedWeight)}.values())

    def _vectors(self) -> list[Tensor]:
        """The parameters that the fast form reads as they are."""
        return read_vectors(self._places)

    def _vectors_are_held(self) -> bool:
        """Whether somebody outside of the model may hold one of them, and give it other memory."""
        places = Counter(map(id, self._vectors()))
        vectors = {id(vector): vector for vector in self._vectors()}
        return count_holders(vectors) != [count_own_holders() + places[key] - 1 for key in vectors]

    def _plain_parameters(self) -> list[tuple[int, int]]:
        """Which those parameters are, and where they lie."""
        return [(id(value), value.data_ptr()) for value in self._vectors()]

    # --- copies -------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "FastModel | PendingCopy":
        self.refresh()
        twin = PendingCopy(copy.deepcopy(self.model, memo), copy.deepcopy(self.watch, memo), self)
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> Any:
        """A pickled model is a plain one."""
        return no_fast_form, ()


class PendingCopy:
    """The fast form of a copied model, to be made at its first use: when it is copied, the model isn't whole yet."""

    def __init__(self, model: Transformer, watch: Watch, original: FastModel):
        self.model, self.watch = model, watch
        self.device, self.dtype = original.device, original.dtype
        self.is_settled = False
        self._modules, self._forms = original.structure.expected, original.forms  # and not the original's weights
        self._rest = original._shared, original._compile, original._choose_capture, True

    def refresh(self, trains: bool = False) -> None:
        modules, vectors = list_modules(self.model), read_vectors(list_places(self.model))
        if has_hooks(modules) or read_modules(modules) != self._modules or read_forms(vectors) != self._forms:
            self.model.fast = None  # it was edited in a way that no fast form has
            return
        self.model.fast = fast = FastModel(self.model, self.watch, *self._rest)
        self.watch.reached = True
        fast.refresh(trains)

    def is_usable(self) -> bool:
        return False

    def warm_up(self) -> None:
        """There is nothing to prepare before the first use."""

    @property
    def version(self) -> object:
        return object()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.refresh()
        return copy.deepcopy(self.model.fast, memo)

    def __reduce__(self) -> Any:
        return no_fast_form, ()


def capture_of_device(device: torch.device, attends: bool) -> CaptureFunction | None:
    """How steps are captured. Without kernels the CPU waits for no Python that would be worth it."""
    if device.type == "cuda":
        return GraphCapture(device)
    return capture_calls if device.type == "cpu" and attends else None


def count_holders(vectors: dict[int, Tensor]) -> list[int]:
    return [*map(sys.getrefcount, vectors.values())]


@functools.cache
def count_own_holders() -> int:
    """`count_holders` of a vector that stands in one place, and that nobody else holds."""
    own = {"weight": nn.Parameter(torch.empty(1))}
    return count_holders({0: own["weight"]})[0]


def list_places(model: Transformer) -> list[ParameterPlace]:
    """Where the model's parameters stand, without a look at them."""
    return [(own, name) for module in list_modules(model) for own in [module._parameters] for name in own]


def read_vectors(places: list[ParameterPlace]) -> list[Tensor]:
    """The parameters there that aren't packed."""
    values = [dict.get(own, name) for own, name in places]
    return [value for value in values if isinstance(value, Tensor)]


def read_numbers(vector: Tensor) -> object:
    """What it is and holds, of which any change is seen: a sum of its bits, each number's by a random odd factor."""
    bits = vector.detach().reshape(-1).view(INTEGERS[vector.itemsize]).long()
    total = (bits * draw_odd_factors(len(bits)).to(bits.device)).sum()
    return id(vector), vector.dtype, vector.shape, vector.data_ptr(), vector._version, total.item()


@functools.lru_cache(64)
def draw_odd_factors(count: int) -> Tensor:
    return torch.randint(1 << 62, (count,), generator=torch.Generator().manual_seed(count)) * 2 + 1


def read_forms(tensors: list[Tensor]) -> list[Any]:
    """What kernels take for granted of each."""
    return [(tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous()) for tensor in tensors]


def no_fast_form() -> None:
    return None
