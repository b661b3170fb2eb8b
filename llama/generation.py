"""Llama: a model and its tokenizer, and the text that they make.

`Llama.stream` is what generation is: it yields tokens as they are chosen. `complete` drains it, and `generate`,
`text_completion` and `chat_completion` format what that returns. Knows no file format and no layer of the network.
"""

from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from . import parallel
from ._util.validate import check_count, check_dialogs, check_seed, check_texts
from .accelerate.accelerator import Acceleration, find_place
from .accelerate.quantization import Quantization
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.loader import check_prepared, fetch_checkpoint, holds_adapter, open_checkpoint, prepare_model
from .checkpoints.tokenizer_of import open_tokenizer_of
from .engine.beam_search import Beams, search_beams
from .engine.engine import Engine
from .engine.outputs import (
    ChatPrediction,
    Completion,
    CompletionPrediction,
    collect,
    describe_completion,
    select_best,
)
from .engine.request_checks import check_best_of
from .engine.scoring import Pooling, Score, ScoringOptions, embed, score
from .engine.sequence import OutputOptions, Step
from .engine.sequence_maker import CallOptions
from .engine.speculative import SPECULATE_K
from .model import Transformer
from .sampling import sample_top_p
from .tokenization.chat_template import find_variables, make_formatter
from .tokenization.inputs import Text, TextOptions
from .tokenization.messages import split_options
from .tokenization.protocol import AnyTokenizer
from .tokenization.texts import read_message
from .tokenization.tool_calls import find_tool_form
from .tokenizer import Dialog, Message

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Step", "sample_top_p"]

PREFILL_CHUNK = 2048  # tokens of prompts in one forward pass


def open_model(ckpt_dir: str | Path, adapter_dir: str | Path | None, dtype: torch.dtype | None) -> Checkpoint:
    """The checkpoint, with the adapter in its tensors, those in this dtype; None: the files'."""
    if adapter_dir is None and not holds_adapter(ckpt_dir):
        return open_checkpoint(ckpt_dir)
    from .adapters.opening import open_adapted  # here: a model without an adapter doesn't need that wing

    return open_adapted(ckpt_dir, adapter_dir, dtype=dtype)


class Llama:
    """A Transformer and its Tokenizer: `Llama.build(...)`, then `text_completion`, `chat_completion`, `generate`.

    Calls may come from several threads, and streams may be drained in turn. On several ranks, every rank makes the same
    calls with the same arguments, from one thread.
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
        draft_ckpt_dir: str | Path | None = None,
        adapter_dir: str | Path | None = None,
        kv_cache_gb: float | None = None,
    ) -> "Llama":
        """Load a checkpoint directory on the ranks that run.

        ckpt_dir: in Meta's or Hugging Face's layout; a URL is copied to a local cache first. tokenizer_path: a
        tokenizer.model or tokenizer.json; default: the one in ckpt_dir. max_seq_len, max_batch_size: the size of the KV
        cache, and so of what fits in one call. model_parallel_size: default: the world size. device, dtype: names or
        torch's objects; default: the best there is; dtype "auto" is that of the files.
        compile: prepare all decoding steps before the first answer. torch compiles them, which takes a while, and less
        in later runs; on a CPU with kernels they are captured instead, which takes hardly any time.
        quantization: "int8" or "int4" quantizes the matrices while they are loaded, to a half or a third of bfloat16's
        bytes. Matrices that the checkpoint stores quantized stay as they are.
        prefill_chunk: tokens of prompts, of all rows together, that one forward pass takes at most.
        draft_ckpt_dir: a smaller model of the same vocabulary that proposes tokens; see `stream`.
        adapter_dir: an adapter of peft's, which is merged into the weights, with its tokenizer if it has one. Its
        directory may also be ckpt_dir: the base is then the one that it names. See docs/adapters.md.
        kv_cache_gb: memory of a rank's KV cache, for all that runs and for cached prefixes; default: that of
        max_batch_size rows of max_seq_len tokens.
        Raises LlamaError, on every rank, for whatever can't work.
        """
        acceleration = Acceleration(quantization, compile)
        place = find_place(model_parallel_size, device, None if dtype == "auto" else dtype)
        ckpt_dir, adapter_dir = fetch_checkpoint(ckpt_dir), fetch_checkpoint(adapter_dir)
        draft_ckpt_dir = fetch_checkpoint(draft_ckpt_dir)
        today = parallel.broadcast_object(datetime.now())  # chat templates may write the date
        with parallel.raise_together():
            check_count("max_seq_len", max_seq_len)
            check_count("max_batch_size", max_batch_size)
            check_count("prefill_chunk", prefill_chunk)
            check_seed(seed)
            opened = [open_model(ckpt_dir, adapter_dir, None if dtype == "auto" else place.dtype)]
            if draft_ckpt_dir is not None:
                opened.append(open_checkpoint(draft_ckpt_dir, argument="draft_ckpt_dir"))
            options = place, acceleration, max_seq_len, max_batch_size, dtype == "auto"
            main, *drafts = [prepare_model(checkpoint, *options) for checkpoint in opened]
            main = replace(main, kv_cache_gb=kv_cache_gb)
            tokenizer = open_tokenizer_of(main.checkpoint, tokenizer_path)
            check_prepared(main, drafts, tokenizer)
        model, draft_model = main.load(), next((draft.load() for draft in drafts), None)
        return Llama(
            model,
            tokenizer,
            seed=seed,
            today=today,
            prefill_chunk=prefill_chunk,
            draft=draft_model,
            cache_tokens=main.cache_tokens,
        )

    def __init__(
        self,
        model: Transformer,
        tokenizer: AnyTokenizer,
        *,
        seed: int = 1,
        today: datetime | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        draft: Transformer | None = None,
        cache_tokens: int | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = make_formatter(tokenizer, today or datetime.now())
        self.draft = draft
        self.engine = Engine(model, tokenizer, seed, prefill_chunk, draft, cache_tokens)

    def stream(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        n: int = 1,
        top_logprobs: int = 0,
        rows: abc.Sequence[Mapping[str, Any] | None] | None = None,
        lookup_ngram: int | None = None,
        speculate_k: int = SPECULATE_K,
        prefix_cache: bool = False,
        ordered_rows: bool = False,
        **settings: Any,
    ) -> Iterator[list[Step]]:
        """Generate from each prompt, yielding after every step of the engine a `Step` for each sequence that went on.

        More prompts than max_batch_size wait for each other's room.

        max_gen_len: tokens that an answer gets at most (None: what fits in max_seq_len). temperature: 0 takes the
        likeliest token. top_p: in (0, 1]. echo: the first list yielded holds the prompts' own tokens. A prompt that
        fills max_seq_len gets no token, and so no step.
        n: answers to each prompt, which share its prefill. top_logprobs: how many of the likeliest tokens each step
        reports. settings: further ones, of all prompts; see `Settings`. rows: for each prompt a dict of settings that
        override those of all, or None.
        lookup_ngram: look for an earlier place where the last `lookup_ngram` tokens occurred, and check the up to
        speculate_k tokens that followed there in one pass. The tokens are the same; the passes are fewer, each with
        several steps of a sequence; see `acceptance`. None: a draft model proposes them, if there is one.
        prefix_cache: begin at what the KV cache holds of a prompt from earlier calls with this option, and from
        sessions, and leave this call's to later ones. ordered_rows: keep rows of passes in the order of the prompts,
        which `llama.engine.rows` tells in a hook.

        Each sequence draws its own random numbers, from the seed of this Llama, the prompt, and how often it was given
        that prompt; or from the sequence's own seed. They don't depend on the other sequences.
        Raises LlamaError, before any forward pass, for arguments that can't work.
        """
        shared = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, **settings}
        output = OutputOptions(logprobs, echo, top_logprobs)
        options = CallOptions(output, n, lookup_ngram, speculate_k, prefix_cache, ordered_rows)
        return self.engine.stream(self.engine.make_requests(prompt_tokens, shared, rows, options))

    @property
    def acceptance(self) -> float | None:
        """The share of the tokens proposed in the last call that the model chose; None where none was proposed."""
        proposed = sum(s.proposed for s in self.engine.last_call)
        return sum(s.accepted for s in self.engine.last_call) / proposed if proposed else None

    def generate(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Any,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Token ids generated for each prompt, cut before the first stop, and their logprobs where asked for.

        Arguments and errors are those of `complete`. With echo, the prompt's tokens come first; with echo and logprobs,
        so do their logprobs (0.0 for the first, which nothing predicts).
        """
        if echo and logprobs:
            options["prompt_logprobs"] = True
        completions = self.complete(prompt_tokens, max_gen_len, temperature, top_p, logprobs, **options)
        tokens = [(c.prompt if echo else []) + c.tokens for c in completions]
        if not logprobs:
            return tokens, None
        return tokens, [((c.prompt_logprobs if echo else None) or []) + (c.logprobs or []) for c in completions]

    def complete(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        *,
        n: int = 1,
        best_of: int | None = None,
        prompt_logprobs: bool = False,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
        top_logprobs: int = 0,
        rows: abc.Sequence[Mapping[str, Any] | None] | None = None,
        lookup_ngram: int | None = None,
        speculate_k: int = SPECULATE_K,
        prefix_cache: bool = False,
        ordered_rows: bool = False,
        **settings: Any,
    ) -> list[Completion]:
        """Whole answers, with all that is known of them: n to the first prompt, then n to the second ...

        best_of: generate this many answers, and return the n of the highest mean logprob, the best first.
        prompt_logprobs: give those of the prompts' tokens too. num_beams: above 1, search for the likeliest answers,
        and return num_return_sequences to each prompt; see `engine.beam_search.Beams`.
        The other arguments, and the errors, are those of `stream`.
        """
        shared = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, **settings}
        with self.engine.together("complete", prompts=prompt_tokens, settings=(shared, rows, n, num_beams)):
            check_count("n", n)
            if best_of is not None:
                check_best_of(best_of, n)
            beams = Beams(num_beams, length_penalty, early_stopping, num_return_sequences)
            others = {"n": n > 1, "best_of": best_of, "rows": rows, "top_logprobs": top_logprobs}
            others |= {"lookup_ngram": lookup_ngram, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
            others |= {"prefix_cache": prefix_cache, "ordered_rows": ordered_rows}
            beam_settings = beams.check(shared, others)
            output = OutputOptions(logprobs or prompt_logprobs or best_of is not None, prompt_logprobs, top_logprobs)
            options = CallOptions(output, best_of or n, lookup_ngram, speculate_k, prefix_cache, ordered_rows, True)
            if beam_settings is None:
                requests = self.engine.make_requests(prompt_tokens, shared, rows, options)
        if beam_settings is not None:
            return search_beams(self.engine, prompt_tokens, beams, beam_settings)
        completions = collect(self.engine.stream(requests), [request.sequence for request in requests])
        if best_of is not None:
            completions = select_best(completions, best_of, n)
        return completions if logprobs else [replace(c, logprobs=None) for c in completions]

    def text_completion(
        self,
        prompts: abc.Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Any,
    ) -> list[CompletionPrediction]:
        """Continue each prompt. `options` are those of `complete`.

        With logprobs, "tokens" (their texts) and "logprobs" are there too; with echo, each begins with its prompt.
        """
        with self.engine.together("text_completion", prompts=prompts):
            check_texts(prompts)
            prompt_tokens = [self.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
        if echo and logprobs:
            options["prompt_logprobs"] = True
        completions = self.complete(prompt_tokens, max_gen_len, temperature, top_p, logprobs, **options)
        n_special = len(self.tokenizer.encode("", bos=True, eos=False))  # begin_of_text, where the tokenizer has it
        predictions: list[CompletionPrediction] = []
        for c in completions:
            echoed = self.tokenizer.decode(c.prompt[n_special:]) if echo else ""
            predictions.append({"generation": echoed + c.text, **describe_completion(c, self.tokenizer, echo)})
        return predictions

    def chat_completion(
        self,
        dialogs: abc.Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Any,
    ) -> list[ChatPrediction]:
        """The assistant's next message in each dialog; with logprobs, "tokens" and "logprobs" too.

        `options` are those of `complete` and those of all dialogs: `tokenization.messages.DialogOptions`. With tools, a
        message has "tool_calls" and "reasoning_content" where the model wrote some, and what remains as content.
        """
        with self.engine.together("chat_completion", dialogs=dialogs):
            check_dialogs(dialogs)
            asked, others = split_options(options, lambda: find_variables(self.formatter))
            prompt_tokens = [self.formatter.encode_dialog_prompt(dialog, **asked) for dialog in dialogs]
        completions = self.complete(prompt_tokens, max_gen_len, temperature, top_p, logprobs, **others)
        form = find_tool_form(self.formatter) if asked.get("tools") else None
        messages = [read_message(self.tokenizer, form, c.prompt, c.tokens, c.text) for c in completions]
        return [
            {"generation": message, **describe_completion(c, self.tokenizer)}
            for c, message in zip(completions, messages, strict=True)
        ]

    def score(self, texts: abc.Sequence[Text], **options: Unpack[ScoringOptions]) -> list[Score]:
        """How likely the model finds each text or dialog: see `engine.scoring.score`."""
        return score(self.engine, texts, self.formatter, **options)

    def embed(self, texts: abc.Sequence[Text], pooling: Pooling = "last", **options: Unpack[TextOptions]) -> Tensor:
        """A vector for each text or dialog, float32 (texts, dim): see `engine.scoring.embed`."""
        return embed(self.engine, texts, pooling, self.formatter, **options)
