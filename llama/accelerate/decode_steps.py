"""Decoding steps of a fast model, all of one kind, so that they can be compiled by torch or recorded.

Knows the network's one function, `Transformer.run`; knows no generation. Torch keeps on disk what it compiled; after
`warm_up` nothing is compiled or recorded any more, and a step that torch would have to compile runs as it is.
"""

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor
from tqdm import tqdm

from .._util.ranks import is_main_process
from ..model import Attention, StartPos, Transformer, TransformerBlock, attention_mask

SHORTEST = 128  # cached positions that attention looks at, where their number is part of what is compiled or recorded

# Tokens (B, 1), their positions (B), the angles there, of how many cached positions there are masks -> (B, 1, dim).
Step = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


class Steps:
    """In the place of a model's `run`: one token a row goes to `step`, all else runs as it did.

    kernels: whether attention looks at each row's own positions; else it looks at a power of two of them, masked.
    A model that was cast or moved since runs as it did, too.
    """

    step: Step

    def __init__(self, model: Transformer, kernels: bool):
        self._model = model
        self.kernels = kernels
        self._kind = self._kind_now()
        self._plain = model.run
        self.step = self.masked

    def __call__(
        self,
        tokens: Tensor,
        start_pos: StartPos | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        window_mask: Tensor | None,
    ) -> Tensor:
        bsz, seqlen = tokens.shape
        if start_pos is None or seqlen > 1 or self._kind_now() != self._kind:
            return self._plain(tokens, start_pos, freqs_cis, mask, window_mask)
        device = tokens.device
        positions = torch.full((bsz,), start_pos, device=device) if isinstance(start_pos, int) else start_pos.long()
        angles = freqs_cis.view(-1, 1, freqs_cis.shape[-1]).expand(bsz, -1, -1).contiguous()  # (B, 1, D / 2)
        if self.kernels:
            angles = torch.view_as_real(angles)  # for who compiles, too, knows no complex numbers
            return self.step(tokens, positions, angles, None)
        return self.step(tokens, positions, angles, self._room(int(start_pos) + 1 if mask is None else mask.shape[-1]))

    @torch.no_grad()
    def warm_up(self) -> None:
        """Make a step of each size of batch, which writes over the cache's beginning."""
        device, most = self._model.norm.weight.device, self._model.params.max_batch_size
        make_caches(self._model)  # here, and not in what is compiled
        sizes = sorted({min(size_of(bsz), most) for bsz in range(1, most + 1)})
        for size in tqdm(sizes, desc="preparing", disable=not is_main_process() or None):
            self._model.hidden_states(torch.zeros(size, 1, dtype=torch.long, device=device), 0)

    def masked(self, tokens: Tensor, positions: Tensor, angles: Tensor, end: int | None) -> Tensor:
        """A step that looks at the first `end` cached positions, or None: at those that each row has."""
        mask = window_mask = None
        if end is not None:
            mask = attention_mask(positions[:, None], end)
            window_mask = attention_mask(positions[:, None], end, self._model.params.sliding_window)
        return self.network(tokens, positions, angles, mask, window_mask)

    def network(
        self, tokens: Tensor, positions: Tensor, angles: Tensor, mask: Tensor | None, window_mask: Tensor | None
    ) -> Tensor:
        return self._plain(tokens, positions, angles, mask, window_mask)

    def _room(self, end: int) -> int:
        return min(max(SHORTEST, 1 << (end - 1).bit_length()), self._model.params.max_seq_len)

    def _kind_now(self) -> tuple[torch.device, torch.dtype]:
        return self._model.norm.weight.device, self._model.norm.weight.dtype


class CompiledSteps(Steps):
    """Steps whose layers are compiled: a function for one row, and one for any number of rows, for all layers."""

    def __init__(self, model: Transformer, kernels: bool):
        super().__init__(model, kernels)
        # Torch counts what it compiled of a piece of code, and refuses a ninth: every model has a copy to itself.
        forward = TransformerBlock.forward
        own = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
        self._layer = torch.compile(own, fullgraph=True, dynamic=True)
        self._warm = False

    def network(
        self, tokens: Tensor, positions: Tensor, angles: Tensor, mask: Tensor | None, window_mask: Tensor | None
    ) -> Tensor:
        """As `Transformer.run`, whose loop torch would unroll, and compile each layer by itself."""
        model = self._model
        with torch.compiler.set_stance("eager_on_recompile" if self._warm else "default"):
            h = model.tok_embeddings(tokens)  # (B, 1, dim)
            for layer in model.layers:
                h = self._layer(layer, h, positions, angles, mask if layer.window is None else window_mask)
            return model.norm(h)

    def warm_up(self) -> None:
        super().warm_up()
        self._warm = True


def size_of(bsz: int) -> int:
    """The rows that are recorded for so many: powers of two up to 8, then multiples of 8."""
    return 1 << (bsz - 1).bit_length() if bsz <= 8 else -(-bsz // 8) * 8


def make_caches(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.caches(model.norm.weight)
