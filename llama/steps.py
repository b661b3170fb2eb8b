"""Decoding steps of a fast model, compiled by torch: a function for one row, and one for any number of rows.

Knows the network's one function, `Transformer.run`; knows no generation. Torch keeps on disk what it compiled; after
`warm_up` nothing is compiled any more, and a step that would need it runs as it is.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from .model import Attention, StartPos, Transformer, attention_mask
from .parallel import is_printer

SHORTEST = 128  # cached positions that attention looks at, where their number is part of what is compiled


class CompiledSteps:
    """In the place of a model's `run`: steps of one token a row are compiled, all else runs as it did.

    kernels: whether attention looks at each row's own positions; else it looks at a power of two of them, masked.
    """

    def __init__(self, model: Transformer, kernels: bool):
        self._model = model
        self._kernels = kernels
        self._plain = model.run
        self._step = torch.compile(model.run, fullgraph=True, dynamic=True)
        self._warm = False

    def __call__(
        self,
        tokens: Tensor,
        start_pos: StartPos | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        window_mask: Tensor | None,
    ) -> Tensor:
        bsz, seqlen = tokens.shape
        if start_pos is None or seqlen > 1:
            return self._plain(tokens, start_pos, freqs_cis, mask, window_mask)
        device = tokens.device
        positions = torch.full((bsz,), start_pos, device=device) if isinstance(start_pos, int) else start_pos.long()
        angles = freqs_cis.view(-1, 1, freqs_cis.shape[-1]).expand(bsz, -1, -1).contiguous()  # (B, 1, D / 2)
        if self._kernels:
            mask = window_mask = None
            angles = torch.view_as_real(angles)  # for who compiles, too, knows no complex numbers
        else:
            end = self._room(int(start_pos) + 1 if mask is None else mask.shape[-1])
            mask = attention_mask(positions[:, None], end)
            window_mask = attention_mask(positions[:, None], end, self._model.params.sliding_window)
        with torch.compiler.set_stance("eager_on_recompile" if self._warm else "default"):
            return self._step(tokens, positions, angles, mask, window_mask)

    def _room(self, end: int) -> int:
        return min(max(SHORTEST, 1 << (end - 1).bit_length()), self._model.params.max_seq_len)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile, or read what was compiled before: for one row, and for more. Writes over the cache's beginning."""
        args, device = self._model.params, self._model.norm.weight.device
        for module in self._model.modules():
            if isinstance(module, Attention):
                module.caches(self._model.norm.weight)  # made here, and not in what is compiled
        for bsz in tqdm(sorted({1, min(2, args.max_batch_size)}), desc="compiling", disable=not is_printer() or None):
            tokens = torch.zeros(bsz, 1, dtype=torch.long, device=device)
            self._model.hidden_states(tokens, 0)
        self._warm = True


def compile_steps(model: Transformer, kernels: bool) -> None:
    """Have the model's decoding steps compiled, now."""
    steps = CompiledSteps(model, kernels)
    model.run = steps  # type: ignore[method-assign]
    steps.warm_up()
