"""Decode steps, one token a row, of one kind, so that torch can compile them or a capture can hold them.

Torch keeps on disk what it compiled. After `warm_up` nothing is compiled any more: a step that torch would have to
compile runs as it is. Knows the fast network; knows no generation.
"""

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor

from .._util.console import progress_bar
from .._util.slots import Slots
from ..kv_cache import Pass, attention_mask
from ..model import ModelArgs
from .call_capture import CaptureFunction
from .cuda_graphs import CapturedSteps, padded_size
from .layers import FastNetwork, run_block

SHORTEST = 128  # cached positions that attention sees, where their number is part of what is compiled or captured


class DecodeSteps:
    """Runs passes of one token a row.

    With an attention kernel each row sees its own positions; else all see a power of two of them, masked.
    """

    def __init__(self, network: FastNetwork, params: ModelArgs, compiled: bool):
        self.network, self.params = network, params
        self.captured: CapturedSteps | None = None
        self._run_block = run_block
        self._compiled, self._warm = compiled, False
        if compiled:
            # Torch counts what it compiled of a piece of code, and refuses a ninth: every model has a copy to itself.
            own = FunctionType(run_block.__code__.replace(), run_block.__globals__, run_block.__name__)
            self._run_block = torch.compile(own, fullgraph=True, dynamic=True)

    def __call__(self, inputs: Pass) -> Tensor:
        bsz, device, start_pos = len(inputs.tokens), inputs.tokens.device, inputs.start_pos
        positions = torch.full((bsz,), start_pos, device=device) if isinstance(start_pos, int) else start_pos.long()  # type: ignore[union-attr]
        step = self.run if self.captured is None else self.captured
        freqs_cis = inputs.freqs_cis
        angles = freqs_cis.view(-1, 1, freqs_cis.shape[-1]).expand(bsz, -1, -1).contiguous()  # (B, 1, D/2)
        if self.network.attends:
            angles = torch.view_as_real(angles)  # the compiler, too, knows no complex numbers
            return step(inputs.tokens, positions, angles, None, inputs.slots)
        return step(inputs.tokens, positions, angles, self._end(inputs.last + 1), inputs.slots)

    def run(self, tokens: Tensor, positions: Tensor, angles: Tensor, end: int | None, slots: Slots | None) -> Tensor:
        """Tokens (B, 1) at positions (B), and the angles there, in slots -> (B, 1, dim).

        end: how many cached positions every row sees, masked; None: each sees its own.
        """
        mask = window_mask = None
        if end is not None:
            mask = attention_mask(positions[:, None], end)
            window_mask = attention_mask(positions[:, None], end, self.params.sliding_window)
        if not self._compiled:
            return self.network.run(tokens, positions, angles, mask, window_mask, slots=slots)
        with torch.compiler.set_stance("eager_on_recompile" if self._warm else "default"):
            # Block by block: torch would unroll the loop, and compile each block by itself.
            return self.network.run(tokens, positions, angles, mask, window_mask, self._run_block, slots=slots)

    def capture_by(self, capture: CaptureFunction) -> None:
        """Capture steps from now on."""
        attentions = [block.attention for block in self.network.blocks]
        masked = not self.network.attends
        self.captured = CapturedSteps(
            self.run, capture, attentions, self.network.like, self.params.max_batch_size, masked
        )

    @torch.no_grad()
    def warm_up(self, prepare: Callable[[Tensor, int, None, Tensor], Pass]) -> None:
        """Make a step of each size of batch. They write over the slots' beginnings. prepare: the model's."""
        if self._warm:
            return
        most = self.params.max_batch_size
        sizes = sorted({min(padded_size(bsz), most) for bsz in range(1, most + 1)})
        with progress_bar("preparing", len(sizes), " batch sizes") as bar:
            for size in sizes:
                tokens = torch.zeros(size, 1, dtype=torch.long, device=self.network.like.device)
                self(prepare(tokens, 0, None, torch.arange(size)))
                bar.update()
        self._warm = True

    def forget_other_caches(self) -> None:
        """Forget what was captured on KV caches that are no longer there."""
        if self.captured is not None:
            self.captured.forget_other_caches()

    def close(self) -> None:
        """Let go of the network."""
        self.captured = None

    def _end(self, end: int) -> int:
        return min(max(SHORTEST, 1 << (end - 1).bit_length()), self.params.max_seq_len)
