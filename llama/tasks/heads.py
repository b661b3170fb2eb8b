"""Task heads on a Transformer: language modelling, classes of texts, classes of tokens, spans that answer questions.

A head's `forward` runs without a KV cache and is differentiable. The rows of a batch may be padded, on the right or on
the left. `compute_logits` is the part after the Transformer, for whoever has hidden states already.
Knows no files and no text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..adapters.lora import LoraLinear, apply_dropout
from ..checkpoints.task_spec import HeadConfig
from ..errors import LlamaError
from ..model import Transformer
from .losses import IGNORED, class_loss, language_loss, require_integers


@dataclass(frozen=True)
class Output:
    """What a classifier of texts or of tokens computes."""

    logits: Tensor  # float32, (B, labels) or (B, T, labels)
    loss: Tensor | None = None  # float32 (); None if no labels were given


@dataclass(frozen=True)
class SpanOutput:
    """What a question answerer computes."""

    start_logits: Tensor  # float32 (B, T), -inf at padding
    end_logits: Tensor  # float32 (B, T), -inf at padding
    loss: Tensor | None = None  # float32 (); None if no positions were given


@dataclass(frozen=True)
class Padding:
    """Where the tokens of each row stand."""

    starts: Tensor  # (B): the position of the first token
    lengths: Tensor  # (B): the number of tokens

    @staticmethod
    def find(tokens: Tensor, lengths: Tensor | Sequence[int] | None, attention_mask: Tensor | None) -> "Padding":
        """The padding of tokens (B, T).

        lengths: (B), of rows that begin at position 0. attention_mask: (B, T), 1 at tokens. Without both, no row is
        padded. Raises LlamaError for arguments that contradict each other, a row without tokens, and a mask with a gap.
        """
        if tokens.ndim != 2:
            raise LlamaError(f"tokens have shape {tuple(tokens.shape)}, expected (rows, positions)")
        bsz, seqlen = tokens.shape
        if lengths is not None and attention_mask is not None:
            raise LlamaError("both lengths and attention_mask were given: drop one of them")
        if attention_mask is not None:
            return Padding._find_in_mask(tokens, attention_mask)
        counts = torch.full((bsz,), seqlen) if lengths is None else torch.as_tensor(lengths)
        fits = counts.shape == (bsz,) and not counts.is_floating_point()
        if not fits or not bool(((counts > 0) & (counts <= seqlen)).all()):
            raise LlamaError(f"lengths are {counts.tolist()}, expected {bsz} whole numbers in [1, {seqlen}]")
        return Padding(torch.zeros(bsz, dtype=torch.long, device=tokens.device), counts.to(tokens.device))

    @staticmethod
    def _find_in_mask(tokens: Tensor, attention_mask: Tensor) -> "Padding":
        if attention_mask.shape != tokens.shape:
            raise LlamaError(f"attention_mask is {tuple(attention_mask.shape)}, expected {tuple(tokens.shape)}")
        mask = attention_mask.to(tokens.device).bool()
        starts, lengths = mask.int().argmax(dim=-1), mask.sum(dim=-1)
        padding = Padding(starts, lengths)
        is_run = (mask == padding.mask_tokens(tokens.shape[1])).all(dim=-1) & (lengths > 0)  # (B)
        if not bool(is_run.all()):
            row = int((~is_run).nonzero()[0])
            raise LlamaError(
                f"attention_mask of row {row} has no tokens, or padding between them: expected one run of ones"
            )
        return padding

    def mask_tokens(self, seqlen: int) -> Tensor:
        """bool (B, T): which positions hold tokens."""
        positions = torch.arange(seqlen, device=self.starts.device) - self.starts[:, None]
        return (positions >= 0) & (positions < self.lengths[:, None])

    def select_last(self, x: Tensor) -> Tensor:
        """x (B, T, ...) at each row's last token: (B, ...)."""
        return x[torch.arange(len(x), device=x.device), self.starts + self.lengths - 1]


def compute_padded_states(model: Transformer, tokens: Tensor, padding: Padding) -> Tensor:
    """Normed hidden states (B, T, dim) of tokens (B, T); those at padding mean nothing.

    Rows that are padded on the left are moved to the left first, so that causal attention sees no padding.
    """
    if not bool(padding.starts.any()):
        return model.hidden_states(tokens, None, padding.lengths)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    moved = tokens.gather(1, (positions + padding.starts[:, None]) % len(positions))
    h = model.hidden_states(moved, None, padding.lengths)  # (B, T, dim)
    back = (positions - padding.starts[:, None]) % len(positions)  # (B, T)
    return h.gather(1, back[..., None].expand_as(h))


class Head(nn.Module):
    """A Transformer with a head in place of its output layer."""

    def __init__(self, model: Transformer, config: HeadConfig):
        super().__init__()
        self.model = model
        self.config = config

    def create_linear(self, outputs: int, bias: bool) -> nn.Linear:
        """A new layer, whole and equal on every rank, from normal(0, 0.02) as in the published models."""
        dim, device, dtype = self.model.params.dim, self.model.norm.weight.device, self.model.norm.weight.dtype
        layer = skip_init(nn.Linear, dim, outputs, bias=bias, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            layer.weight.copy_(torch.empty(layer.weight.shape).normal_(std=0.02, generator=generator))
            if bias:
                layer.bias.zero_()
        return layer


class CausalLM(nn.Module):
    """The Transformer with its own output layer, for training on text."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor,
    ) -> Tensor:
        """The loss: float32 (). labels: (B, T), the tokens themselves, -100 where nothing is to be learnt.

        Logits aren't returned: `losses.language_loss` holds those of a few positions at a time. `model` computes them.
        """
        h = compute_padded_states(self.model, tokens, Padding.find(tokens, lengths, attention_mask))
        output = self.model.output
        return language_loss(h, output.compute_weight() if isinstance(output, LoraLinear) else output.weight, labels)


class SequenceClassifier(Head):
    """Classes of whole texts, or numbers for them, from each row's last token."""

    def __init__(self, model: Transformer, config: HeadConfig):
        super().__init__(model, config)
        self.score = self.create_linear(len(config.labels), bias=False)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """logits (B, labels) of tokens (B, T).

        labels: classes (B); or float (B, labels), 1 for each class that applies; or numbers, (B) or (B, labels), for a
        regression.
        """
        padding = Padding.find(tokens, lengths, attention_mask)
        logits = self.compute_logits(padding.select_last(compute_padded_states(self.model, tokens, padding)))
        return Output(logits, None if labels is None else self.compute_loss(logits, labels))

    def compute_logits(self, h: Tensor) -> Tensor:
        """Normed hidden states (..., dim) of last tokens -> float32 (..., labels)."""
        return self.score(h).float()

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.infer_problem_type(labels)
        if kind == "single_label_classification":
            return class_loss(logits, labels)
        if labels.shape not in (logits.shape, logits.squeeze(-1).shape):
            raise LlamaError(f"labels are {tuple(labels.shape)}, expected {tuple(logits.shape)} for {kind}")
        loss_function = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        return loss_function(logits, labels.view_as(logits).float())


class TokenClassifier(Head):
    """A class for each token."""

    def __init__(self, model: Transformer, config: HeadConfig):
        super().__init__(model, config)
        self.score = self.create_linear(len(config.labels), bias=True)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """logits (B, T, labels) of tokens (B, T). labels: (B, T), -100 where there is nothing to learn."""
        h = compute_padded_states(self.model, tokens, Padding.find(tokens, lengths, attention_mask))
        logits = self.compute_logits(h)
        return Output(logits, None if labels is None else class_loss(logits, labels))

    def compute_logits(self, h: Tensor) -> Tensor:
        """Normed hidden states (..., dim) -> float32 (..., labels)."""
        return self.score(apply_dropout(h, self.config.dropout * self.training)).float()


class QuestionAnswerer(Head):
    """The first and the last token of an answer, among the tokens of a row."""

    def __init__(self, model: Transformer, config: HeadConfig):
        super().__init__(model, config)
        self.qa_outputs = self.create_linear(2, bias=True)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> SpanOutput:
        """Logits (B, T) of tokens (B, T).

        start_positions, end_positions: (B), of the answers' first and last tokens. A position without a token of the
        row is ignored. Padding is left out of the softmax, unlike in transformers.
        """
        padding = Padding.find(tokens, lengths, attention_mask)
        is_token = padding.mask_tokens(tokens.shape[1])
        logits = self.compute_logits(compute_padded_states(self.model, tokens, padding))  # (B, T, 2)
        starts, ends = logits.masked_fill(~is_token[..., None], -math.inf).unbind(dim=-1)  # (B, T) each
        if start_positions is None and end_positions is None:
            return SpanOutput(starts, ends)
        if start_positions is None or end_positions is None:
            raise LlamaError("one of start_positions and end_positions was given: a loss needs both")
        start_loss = class_loss(starts, self.ignore_outside(start_positions, is_token, "start_positions"))
        end_loss = class_loss(ends, self.ignore_outside(end_positions, is_token, "end_positions"))
        return SpanOutput(starts, ends, (start_loss + end_loss) / 2)

    def compute_logits(self, h: Tensor) -> Tensor:
        """Normed hidden states (..., dim) -> float32 (..., 2): of the first and of the last token of an answer."""
        return self.qa_outputs(h).float()

    @staticmethod
    def ignore_outside(positions: Tensor, is_token: Tensor, name: str) -> Tensor:
        """Positions (B), with IGNORED for those without a token."""
        positions = require_integers(positions, is_token.shape[:1], name)
        clamped = positions.clamp(0, is_token.shape[1] - 1)
        valid = is_token.gather(1, clamped[:, None]).squeeze(-1) & (clamped == positions)
        return positions.where(valid, IGNORED)
