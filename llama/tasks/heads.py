"""Task heads on the shared Transformer: language, classes of whole texts and of tokens, spans that answer questions.

No cache; differentiable; the rows of a batch may be padded, on the right or on the left. Knows no files and no text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..adapters.lora import LoraLinear, dropped
from ..checkpoints.task_spec import HeadConfig
from ..errors import LlamaError
from ..model import Transformer
from .losses import class_loss, language_loss, whole_numbers

NEVER = float("-inf")


@dataclass(frozen=True)
class Output:
    """logits: float32, where they are asked for. loss: float32 (), where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


@dataclass(frozen=True)
class Spans:
    """start_logits, end_logits: float32 (B, T), -inf at padding. loss: where positions were given."""

    start_logits: Tensor
    end_logits: Tensor
    loss: Tensor | None = None


@dataclass(frozen=True)
class Padding:
    """Where each row's tokens stand: `lengths` (B) of them from `starts` (B) on, of T places."""

    starts: Tensor
    lengths: Tensor

    @staticmethod
    def of(tokens: Tensor, lengths: Tensor | Sequence[int] | None, attention_mask: Tensor | None) -> "Padding":
        """From lengths of rows that begin at 0, or from a mask (B, T), 1 at tokens; neither: all are tokens.

        Raises LlamaError for what contradicts, a row without tokens, and a mask with a hole.
        """
        if tokens.ndim != 2:
            raise LlamaError(f"tokens have shape {tuple(tokens.shape)}, expected (rows, positions)")
        bsz, seqlen = tokens.shape
        if lengths is not None and attention_mask is not None:
            raise LlamaError("both lengths and attention_mask were given: drop one of them")
        if attention_mask is not None:
            return Padding._of_mask(tokens, attention_mask)
        counts = torch.full((bsz,), seqlen) if lengths is None else torch.as_tensor(lengths)
        fits = counts.shape == (bsz,) and not counts.is_floating_point()
        if not fits or not bool(((counts > 0) & (counts <= seqlen)).all()):
            raise LlamaError(f"lengths are {counts.tolist()}, expected {bsz} whole numbers in [1, {seqlen}]")
        return Padding(torch.zeros(bsz, dtype=torch.long, device=tokens.device), counts.to(tokens.device))

    @staticmethod
    def _of_mask(tokens: Tensor, attention_mask: Tensor) -> "Padding":
        if attention_mask.shape != tokens.shape:
            raise LlamaError(f"attention_mask is {tuple(attention_mask.shape)}, expected {tuple(tokens.shape)}")
        mask = attention_mask.to(tokens.device).bool()
        starts, lengths = mask.int().argmax(dim=-1), mask.sum(dim=-1)
        places = torch.arange(tokens.shape[1], device=tokens.device) - starts[:, None]  # (B, T)
        whole = (mask == ((places >= 0) & (places < lengths[:, None]))).all(dim=-1) & (lengths > 0)
        if not bool(whole.all()):
            row = int((~whole).nonzero()[0])
            raise LlamaError(
                f"attention_mask of row {row} has no tokens, or padding between them: expected one run of ones"
            )
        return Padding(starts, lengths)

    def is_token(self, seqlen: int) -> Tensor:
        """(B, T): which places hold tokens."""
        places = torch.arange(seqlen, device=self.starts.device) - self.starts[:, None]
        return (places >= 0) & (places < self.lengths[:, None])

    def last(self, x: Tensor) -> Tensor:
        """x (B, T, ...) at each row's last token: (B, ...)."""
        return x[torch.arange(len(x), device=x.device), self.starts + self.lengths - 1]


def states(model: Transformer, tokens: Tensor, padding: Padding) -> Tensor:
    """Normed hidden states (B, T, dim) of tokens (B, T); those at padding mean nothing.

    What is padded on the left goes through the network moved to the left, where causal attention sees no padding.
    """
    if not bool(padding.starts.any()):
        return model.hidden_states(tokens, None, padding.lengths)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    moved = tokens.gather(1, (places + padding.starts[:, None]) % len(places))
    h = model.hidden_states(moved, None, padding.lengths)  # (B, T, dim)
    back = (places - padding.starts[:, None]) % len(places)  # (B, T)
    return h.gather(1, back[..., None].expand_as(h))


class Head(nn.Module):
    """A Transformer, `model`, and what stands on it instead of its output layer."""

    def __init__(self, model: Transformer, config: HeadConfig):
        super().__init__()
        self.model = model
        self.config = config

    def linear(self, outputs: int, bias: bool) -> nn.Linear:
        """A new layer, whole on every rank; normal(0, 0.02) as the published models' own, alike everywhere."""
        like = self.model.norm.weight
        layer = skip_init(nn.Linear, self.model.params.dim, outputs, bias=bias, device=like.device, dtype=like.dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            layer.weight.copy_(torch.empty(layer.weight.shape).normal_(std=0.02, generator=generator))
            if bias:
                layer.bias.zero_()
        return layer


class CausalLM(nn.Module):
    """The Transformer with its own output layer, to be trained on text."""

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

        `Llama.model` gives logits. See `losses.language_loss` for how little of them is held here.
        """
        h, output = states(self.model, tokens, Padding.of(tokens, lengths, attention_mask)), self.model.output
        return language_loss(h, output.matrix() if isinstance(output, LoraLinear) else output.weight, labels)


class SequenceClassifier(Head):
    """Classes, or numbers, of whole texts: the score of each row's last token."""

    def __init__(self, model: Transformer, config: HeadConfig):
        super().__init__(model, config)
        self.score = self.linear(len(config.labels), bias=False)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """logits (B, labels) of tokens (B, T). labels: (B) classes, or 0 and 1 for each of them, float (B, labels), or
        for regression numbers, (B) or (B, labels)."""
        padding = Padding.of(tokens, lengths, attention_mask)
        logits = self.score(padding.last(states(self.model, tokens, padding))).float()  # (B, labels)
        return Output(logits, None if labels is None else self.loss(logits, labels))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.infer_problem_type(labels)
        if kind == "single_label_classification":
            return class_loss(logits, labels)
        if labels.shape not in (logits.shape, logits.squeeze(-1).shape):
            raise LlamaError(f"labels are {tuple(labels.shape)}, expected {tuple(logits.shape)} for {kind}")
        measure = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        return measure(logits, labels.view_as(logits).float())


class TokenClassifier(Head):
    """A class for each token."""

    def __init__(self, model: Transformer, config: HeadConfig):
        super().__init__(model, config)
        self.score = self.linear(len(config.labels), bias=True)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """logits (B, T, labels) of tokens (B, T). labels: (B, T), -100 where there is nothing to learn."""
        h = states(self.model, tokens, Padding.of(tokens, lengths, attention_mask))
        logits = self.score(dropped(h, self.config.dropout * self.training)).float()  # (B, T, labels)
        return Output(logits, None if labels is None else class_loss(logits, labels))


class QuestionAnswerer(Head):
    """Where an answer starts and where it ends, both among a row's own tokens."""

    def __init__(self, model: Transformer, config: HeadConfig):
        super().__init__(model, config)
        self.qa_outputs = self.linear(2, bias=True)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> Spans:
        """start_positions, end_positions: (B), the places of the answers' first and last tokens. Those at no token of
        the row don't count. Padding is no place that could be chosen; transformers lets it take part in the softmax."""
        padding = Padding.of(tokens, lengths, attention_mask)
        is_token = padding.is_token(tokens.shape[1])
        both = self.qa_outputs(states(self.model, tokens, padding)).float()  # (B, T, 2)
        starts, ends = both.masked_fill(~is_token[..., None], NEVER).unbind(dim=-1)  # (B, T) each
        if start_positions is None and end_positions is None:
            return Spans(starts, ends)
        if start_positions is None or end_positions is None:
            raise LlamaError("one of start_positions and end_positions was given: a loss needs both")
        started = class_loss(starts, self.inside(start_positions, is_token, "start_positions"))
        ended = class_loss(ends, self.inside(end_positions, is_token, "end_positions"))
        return Spans(starts, ends, (started + ended) / 2)

    @staticmethod
    def inside(places: Tensor, is_token: Tensor, name: str) -> Tensor:
        """Places (B), with -100 for those at no token."""
        places = whole_numbers(places, is_token.shape[:1], name)
        within = places.clamp(0, is_token.shape[1] - 1)
        there = is_token.gather(1, within[:, None]).squeeze(-1) & (within == places)
        return places.where(there, -100)
