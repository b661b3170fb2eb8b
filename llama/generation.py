"""Llama: a model, its tokenizer, and text made with them.

One primitive: `Llama.stream` yields tokens as they are made; `generate`, `text_completion` and `chat_completion` drain
it. Knows no file format and no layer of the network.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

from . import parallel
from .chat_template import formatter
from .checkpoint import find_tokenizer, load_model, open_checkpoint
from .checks import (
    agreed_quantization,
    check_count,
    check_list,
    check_memory,
    check_prompts,
    check_ranks,
    check_sampling,
    check_seed,
    check_texts,
    check_vocabulary,
)
from .errors import LlamaError
from .hf_tokenizer import HFStreamDecoder, HFTokenizer, open_tokenizer
from .inference import Form
from .model import Transformer
from .panels import Quantization, bits_of
from .prefill import prefill
from .remote import cache_directory, is_url, local_copy
from .sampling import sample, sample_top_p, token_logprobs
from .tokenizer import Dialog, Message, StreamDecoder, Tokenizer
from .transfer import Arriving, sent

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Step", "sample_top_p"]

PREFILL_CHUNK = 2048  # tokens of prompts in one forward pass


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # not required
    logprobs: list[float]  # not required


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]  # not required
    logprobs: list[float]  # not required


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """One token of one row, as `Llama.stream` yields it.

    row: place of the prompt in the batch. text: what this token made decodable (empty inside a split character).
    logprob: log-probability of the token under the model, or None unless asked for. finish_reason: None while the row
    goes on; "stop" for a stop token, whose own text is left out; "length" when the row's allowance is used up.
    """

    row: int
    token: int
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None


@dataclass
class _Row:
    """A row that is being generated: where it stands, how far it may go, and its own source of chance."""

    index: int
    position: int  # tokens in the row so far
    cached: int  # tokens of it in the KV cache
    left: int  # tokens that it may still get
    decoder: StreamDecoder | HFStreamDecoder
    generator: torch.Generator
    finish_reason: FinishReason | None = None

    def accept(self, token: int, logprob: float | None, stop_tokens: set[int]) -> Step:
        self.position, self.left = self.position + 1, self.left - 1
        if token in stop_tokens:
            self.finish_reason, text = "stop", self.decoder.flush()
        else:
            text = self.decoder.push(token)
            if self.left == 0:
                self.finish_reason, text = "length", text + self.decoder.flush()
        return Step(self.index, token, text, logprob, self.finish_reason)


class Llama:
    """A Transformer and its Tokenizer: `Llama.build(...)`, then `text_completion`, `chat_completion`, `generate`.

    One KV cache, so one stream at a time. On several ranks every rank calls the same methods with the same arguments.
    """

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        quantization: Quantization | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> "Llama":
        """Load a checkpoint directory on the ranks that run.

        ckpt_dir: of Meta's or Hugging Face's layout; a URL is copied to a local cache first. tokenizer_path: a
        tokenizer.model or tokenizer.json, default the one in ckpt_dir. max_seq_len, max_batch_size: size of the KV
        cache, and so of what fits in one call. model_parallel_size: default the world size. device, dtype: names or
        torch's objects, default the best there is; dtype "auto" is that of the files. Raises LlamaError, on every rank,
        for whatever can't work.

        compile: have all decoding steps ready before the first answer, compiled by torch, which takes a while here and
        less when it was done before; on a CPU with kernels recorded, which takes no time to speak of.
        quantization: "int8" or "int4" rounds the matrices as they are loaded, to a half or a third of bfloat16's bytes;
        those that the checkpoint has rounded stay as they are.
        prefill_chunk: tokens of prompts, of all rows together, that one forward pass takes at most.
        """
        form = Form(quantization, compile)
        place = parallel.initialize(model_parallel_size, device, None if dtype == "auto" else dtype)
        if is_url(ckpt_dir):
            with parallel.together(parallel.patient_group()):
                if parallel.leads_machine():
                    local_copy(str(ckpt_dir))
            ckpt_dir = cache_directory(str(ckpt_dir))
        today = parallel.broadcast_object(datetime.now())  # for chat templates that tell the model
        with parallel.together():
            check_count("max_seq_len", max_seq_len)
            check_count("max_batch_size", max_batch_size)
            check_count("prefill_chunk", prefill_chunk)
            check_seed(seed)
            checkpoint = open_checkpoint(ckpt_dir)
            args = replace(checkpoint.sizes, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            check_ranks(checkpoint.directory, args, place.mp_size, checkpoint.group)
            stored = checkpoint.quantization
            form = replace(form, quantization=agreed_quantization(checkpoint.directory, stored, quantization))
            if dtype == "auto":
                place = replace(place, dtype=checkpoint.dtype)
            tokenizer = open_tokenizer(tokenizer_path or find_tokenizer(checkpoint))
            check_vocabulary(args, tokenizer)
            check_memory(args, place, bits_of(form.quantization))
        model = load_model(checkpoint, args, place, form.take)
        form.finish(model)
        return Llama(model, tokenizer, seed=seed, today=today, prefill_chunk=prefill_chunk)

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | HFTokenizer,
        *,
        seed: int = 1,
        today: datetime | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = formatter(tokenizer, today or datetime.now())
        self._seed = seed
        self._prefill_chunk = prefill_chunk
        self._asked: Counter[bytes] = Counter()  # how often each prompt was given, so that asking again draws anew
        self._current: object = None  # the stream that owns the KV cache
        self._ahead = self._device.type == "cuda"  # start a step before the tokens that go into it were read

    # --- what callers use -------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Iterator[list[Step]]:
        """Generate from each prompt, yielding after every forward pass one `Step` for each row still going.

        max_gen_len: tokens a row gets at most (None: what fits in max_seq_len). temperature: 0 takes the likeliest
        token. top_p: in (0, 1]. echo: the first list yielded holds the prompts' own tokens. Rows draw from chance of
        their own, made from the seed, the prompt, and how often this Llama was given that prompt; not from neighbours.
        A prompt that fills max_seq_len gets no token, and so no step.
        Raises LlamaError, before any forward pass, for arguments that can't work.
        """
        with parallel.together(parallel.group()):
            check_prompts(prompt_tokens, self.model.params)
            check_sampling(max_gen_len, temperature, top_p)
        prompts = [[int(token) for token in prompt] for prompt in prompt_tokens]
        return self._stream(prompts, max_gen_len, temperature, top_p, logprobs, echo)

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Token ids generated for each prompt, cut before the first stop token, and their logprobs where asked for.

        Arguments and errors as `stream`. With echo, the prompt's tokens come first; with both, so do their logprobs
        (0.0 for the first, which nothing predicts).
        """
        stream = self.stream(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)
        tokens: list[list[int]] = [[] for _ in prompt_tokens]
        chances: list[list[float]] = [[] for _ in prompt_tokens]
        for steps in stream:
            for step in steps:
                if step.finish_reason != "stop":
                    tokens[step.row].append(step.token)
                    chances[step.row].append(step.logprob or 0.0)
        return tokens, chances if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Go on from each prompt. With logprobs, "tokens" (their texts) and "logprobs" come too; see `generate`."""
        with parallel.together(parallel.group()):
            check_texts(prompts)
            prompt_tokens = [self.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
        tokens, chances = self.generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)
        lead = len(self.tokenizer.encode("", bos=True, eos=False)) if echo else 0  # the prompts' begin_of_text
        texts = [self.tokenizer.decode(t[lead:]) for t in tokens]
        results: list[CompletionPrediction] = [{"generation": text} for text in texts]
        self._add_logprobs(results, tokens, chances)
        return results

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """The assistant's next message in each dialog. With logprobs, "tokens" and "logprobs" come too."""
        with parallel.together(parallel.group()):
            check_list("dialogs", dialogs)
            prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        tokens, chances = self.generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs)
        results: list[ChatPrediction] = [
            {"generation": {"role": "assistant", "content": self.tokenizer.decode(t)}} for t in tokens
        ]
        self._add_logprobs(results, tokens, chances)
        return results

    # --- how it is done ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _stream(
        self,
        prompts: list[list[int]],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool,
    ) -> Iterator[list[Step]]:
        self._current = ticket = object()
        rows = [self._row(i, prompt, max_gen_len) for i, prompt in enumerate(prompts)]
        rows.sort(key=lambda row: -row.position)  # the longest prompt owns the first slot of the KV cache
        h, known = prefill(self.model, [prompts[row.index] for row in rows], self._prefill_chunk, echo and logprobs)
        if echo:
            yield self._echo(prompts, {row.index: known[i] for i, row in enumerate(rows)} if known else None)
            self._refuse_if_not(ticket)
        live, h = self._keep([row for row in rows if row.left > 0], rows, h)
        while live:
            picked = self._choose(self.model.logits(h), live, temperature, top_p, logprobs)
            arriving, next_live = Arriving(picked), live
            if self._ahead:  # one that now stops is in that step for nothing; whose last token this is isn't
                next_live, h = self._decode([row for row in live if row.left > 1], live, picked[0])
            steps = self._accept(arriving.wait(), live, logprobs)
            yield sorted(steps, key=lambda step: step.row)
            going = [row for row in live if row.finish_reason is None]
            if not going:
                return
            self._refuse_if_not(ticket)
            if self._ahead:
                live, h = self._keep(going, next_live, h)
            else:
                live, h = self._decode(going, live, picked[0])

    def _refuse_if_not(self, ticket: object) -> None:
        """To be called after each yield and before the cache is touched: a caller may have started another stream."""
        if self._current is not ticket:
            raise LlamaError("this stream was ended by a newer call on the same Llama: use one at a time")

    def _keep(self, keep: list[_Row], rows: list[_Row], x: Tensor) -> tuple[list[_Row], Tensor]:
        """The rows to keep, which now own the first slots, in their order; and what x, (B, ...), has of them."""
        kept = self._compact(rows, keep)
        if kept == rows:
            return rows, x
        places = {row.index: place for place, row in enumerate(rows)}
        return kept, x[sent(torch.tensor([places[row.index] for row in kept], dtype=torch.long), self._device)]

    def _decode(self, keep: list[_Row], rows: list[_Row], tokens: Tensor) -> tuple[list[_Row], Tensor]:
        """`_keep`, and one forward pass over the token of each row that is kept: (rows, hidden states (B, dim)).

        tokens: (B), of all rows.
        """
        rows, tokens = self._keep(keep, rows, tokens)
        if not rows:
            return rows, tokens
        start_pos = torch.tensor([row.cached for row in rows], pin_memory=self._device.type == "cuda")  # (B)
        for row in rows:
            row.cached += 1
        return rows, self.model.hidden_states(tokens[:, None].long(), start_pos)[:, -1]

    def _choose(self, logits: Tensor, live: list[_Row], temperature: float, top_p: float, logprobs: bool) -> Tensor:
        """The next token of each row, and its logprob, chosen on the group's first rank: (2, B).

        logits: (B, vocab_size). A token of -1 says that they weren't finite.
        """
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        picked = torch.empty(2, len(live), dtype=dtype, device=self._device)  # in one message
        if parallel.leads_group():
            uniform = None
            if temperature > 0:
                draws = [torch.rand((), generator=row.generator) for row in live]
                uniform = sent(torch.stack(draws)[:, None], self._device)  # (B, 1)
            tokens = sample(logits, temperature, top_p, uniform)  # (B)
            finite = logits.isfinite().all(dim=-1)
            picked[0] = tokens.where(finite, -1)
            picked[1] = token_logprobs(logits, tokens) if logprobs else 0.0
        return parallel.broadcast(picked)

    def _accept(self, picked: Tensor, live: list[_Row], logprobs: bool) -> list[Step]:
        """What `_choose` picked, now on the CPU, as the next step of each row."""
        tokens, chances = picked.tolist()
        for row, token in zip(live, tokens, strict=True):
            if token < 0:
                raise LlamaError(
                    f"row {row.index}: the logits at position {row.position} are not finite in {self._dtype}: the "
                    "weights are damaged or this dtype overflows; try --dtype float32"
                )
        stop_tokens = self.tokenizer.stop_tokens
        return [
            row.accept(int(token), chance if logprobs else None, stop_tokens)
            for row, token, chance in zip(live, tokens, chances, strict=True)
        ]

    def _compact(self, rows: list[_Row], keep: list[_Row]) -> list[_Row]:
        """Let the rows to keep own the first slots of the KV cache, so that finished ones cost nothing.

        rows: in the order of their slots. The last ones to keep move into the slots of finished ones before them.
        """
        kept = {row.index for row in keep}
        movable = [slot for slot in range(len(keep), len(rows)) if rows[slot].index in kept]
        rows = list(rows)
        for slot in range(len(keep)):
            if rows[slot].index not in kept:
                source = movable.pop()
                self.model.copy_cache_row(source, slot, rows[source].cached)
                rows[slot] = rows[source]
        return rows[: len(keep)]

    def _echo(self, prompts: list[list[int]], chances: dict[int, list[float]] | None) -> list[Step]:
        """The prompts' own tokens as steps; chances: their logprobs, by row, where asked for."""
        steps = []
        for row, prompt in enumerate(prompts):
            decoder = self.tokenizer.stream_decoder()
            texts = [decoder.push(token) for token in prompt]
            texts[-1] += decoder.flush()
            logprobs = [None] * len(prompt) if chances is None else chances[row]
            steps += [Step(row, t, text, c) for t, text, c in zip(prompt, texts, logprobs, strict=True)]
        return steps

    def _row(self, index: int, prompt: list[int], max_gen_len: int | None) -> _Row:
        key = hashlib.blake2b(repr((self._seed, prompt)).encode(), digest_size=16).digest()
        self._asked[key] += 1
        chance = hashlib.blake2b(key + b"%d" % self._asked[key], digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(chance, "little", signed=True))
        room = self.model.params.max_seq_len - len(prompt)
        left = room if max_gen_len is None else min(room, max_gen_len)
        return _Row(index, len(prompt), len(prompt), left, self.tokenizer.stream_decoder(), generator)

    def _add_logprobs(
        self,
        results: Sequence[CompletionPrediction | ChatPrediction],
        tokens: list[list[int]],
        chances: list[list[float]] | None,
    ) -> None:
        for result, row, logprobs in zip(results, tokens, chances or (), strict=False):
            result["tokens"] = [self.tokenizer.decode([token]) for token in row]
            result["logprobs"] = logprobs

    @property
    def _device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype
