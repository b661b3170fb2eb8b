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
from .accelerate.accelerator import Acceleration
from .accelerate.quantization import Quantization, bits_of
from .checkpoints.fit import check_draft, check_memory, check_vocabulary
from .checkpoints.loader import fetch_checkpoint, prepare_model
from .checkpoints.side_files import find_tokenizer
from .engine.beam_search import Beams
from .engine.engine import Engine
from .engine.model_runner import OutputOptions, settle
from .engine.outputs import (
    ChatPrediction,
    Completion,
    CompletionPrediction,
    describe_completion,
    drain_stream,
    select_best,
)
from .engine.request_checks import check_best_of
from .engine.scoring import Pooling, Score, embed, score
from .engine.sequence import Step
from .engine.speculative import SPECULATE_K
from .model import Transformer
from .sampling import sample_top_p
from .settings import Options, settings_of_rows
from .tokenization.chat_template import make_formatter
from .tokenization.hf_tokenizer import open_tokenizer
from .tokenization.protocol import AnyTokenizer
from .tokenizer import Dialog, Message

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Step", "sample_top_p"]

PREFILL_CHUNK = 2048  # tokens of prompts in one forward pass


class Llama:
    """A Transformer and its Tokenizer: `Llama.build(...)`, then `text_completion`, `chat_completion`, `generate`.

    It has one KV cache, so one stream at a time. On several ranks, every rank makes the same calls with the same
    arguments.
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

        Raises LlamaError, on every rank, for whatever can't work.
        """
        acceleration = Acceleration(quantization, compile)
        place = parallel.initialize(model_parallel_size, device, None if dtype == "auto" else dtype)
        draft_dirs = [] if draft_ckpt_dir is None else [draft_ckpt_dir]
        directories = [fetch_checkpoint(directory) for directory in (ckpt_dir, *draft_dirs)]
        today = parallel.broadcast_object(datetime.now())  # chat templates may write the date
        with parallel.raise_together():
            check_count("max_seq_len", max_seq_len)
            check_count("max_batch_size", max_batch_size)
            check_count("prefill_chunk", prefill_chunk)
            check_seed(seed)
            sizes = max_seq_len, max_batch_size
            main, *drafts = [
                prepare_model(directory, place, acceleration, *sizes, dtype == "auto") for directory in directories
            ]
            tokenizer = open_tokenizer(tokenizer_path or find_tokenizer(main.checkpoint))
            check_vocabulary(main.args, tokenizer)
            for draft in drafts:
                check_draft(draft.checkpoint.directory, draft.args.vocab_size, main.args.vocab_size)
            draft_memory = sum(sum(draft.memory) for draft in drafts)
            check_memory(main.args, main.place, bits_of(main.acceleration.quantization), draft_memory)
        model, draft_model = main.load(), next((draft.load() for draft in drafts), None)
        return Llama(model, tokenizer, seed=seed, today=today, prefill_chunk=prefill_chunk, draft=draft_model)

    def __init__(
        self,
        model: Transformer,
        tokenizer: AnyTokenizer,
        *,
        seed: int = 1,
        today: datetime | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        draft: Transformer | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = make_formatter(tokenizer, today or datetime.now())
        self.draft = draft
        self.engine = Engine(model, tokenizer, seed, prefill_chunk, draft)

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
        **settings: Any,
    ) -> Iterator[list[Step]]:
        """Generate from each prompt, yielding after every forward pass one `Step` for each sequence still going.

        max_gen_len: tokens that an answer gets at most (None: what fits in max_seq_len). temperature: 0 takes the
        likeliest token. top_p: in (0, 1]. echo: the first list yielded holds the prompts' own tokens. A prompt that
        fills max_seq_len gets no token, and so no step.
        n: answers to each prompt, which share its prefill. top_logprobs: how many of the likeliest tokens each step
        reports. settings: further ones, of all prompts; see `Settings`. rows: for each prompt a dict of settings that
        override those of all, or None.
        lookup_ngram: look for an earlier place where the last `lookup_ngram` tokens occurred, and check the up to
        speculate_k tokens that followed there in one pass. The tokens are the same; the passes are fewer, each with
        several steps of a sequence; see `acceptance`. None: a draft model proposes them, if there is one.

        Each sequence draws its own random numbers, from the seed of this Llama, the prompt, and how often it was given
        that prompt; or from the sequence's own seed. They don't depend on the other sequences.
        Raises LlamaError, before any forward pass, for arguments that can't work.
        """
        shared = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, **settings}
        sequences = self.engine.make_sequences(prompt_tokens, shared, rows, n, top_logprobs)
        return self.engine.run(sequences, OutputOptions(logprobs, echo, top_logprobs), lookup_ngram, speculate_k)

    @property
    def acceptance(self) -> float | None:
        """The share of the tokens proposed in the last call that the model chose; None where none was proposed."""
        runner = self.engine.runner
        return runner.accepted / runner.proposed if runner.proposed else None

    def generate(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
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
        **settings: Any,
    ) -> list[Completion]:
        """Whole answers, with all that is known of them: n to the first prompt, then n to the second ...

        best_of: generate this many answers, and return the n of the highest mean logprob, the best first.
        prompt_logprobs: give those of the prompts' tokens too. num_beams: above 1, search for the likeliest answers,
        and return num_return_sequences to each prompt; see `engine.beam_search.Beams`.
        The other arguments, and the errors, are those of `stream`.
        """
        shared = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, **settings}
        with parallel.raise_together(parallel.group()):
            check_count("n", n)
            if best_of is not None:
                check_best_of(best_of, n)
            beams = Beams(num_beams, length_penalty, early_stopping, num_return_sequences)
            if num_beams == 1:
                beams.check_unused()
            else:
                (beam_settings,) = settings_of_rows(1, shared, None)
                others = {"n": n > 1, "best_of": best_of, "rows": rows, "top_logprobs": top_logprobs}
                others |= {"lookup_ngram": lookup_ngram, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
                beams.check_with(beam_settings, others)
        if num_beams > 1:
            return self.engine.search_beams(prompt_tokens, beams, beam_settings)
        count = best_of or n
        stream = self.stream(
            prompt_tokens,
            logprobs=logprobs or prompt_logprobs or best_of is not None,
            echo=prompt_logprobs,
            n=count,
            top_logprobs=top_logprobs,
            rows=rows,
            lookup_ngram=lookup_ngram,
            speculate_k=speculate_k,
            **shared,
        )
        calls_back = any("logits_processor" in options for options in (shared, *(rows or [])) if options)
        with settle(self.model, calls_back):
            completions = drain_stream(stream, prompt_tokens, count, prompt_logprobs)
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
        **options: Unpack[Options],
    ) -> list[CompletionPrediction]:
        """Continue each prompt. `options` are those of `complete`.

        With logprobs, "tokens" (their texts) and "logprobs" are there too; with echo, each begins with its prompt.
        """
        with parallel.raise_together(parallel.group()):
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
        **options: Unpack[Options],
    ) -> list[ChatPrediction]:
        """The assistant's next message in each dialog. `options` are those of `complete`.

        With logprobs, "tokens" and "logprobs" are there too.
        """
        with parallel.raise_together(parallel.group()):
            check_dialogs(dialogs)
            prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        completions = self.complete(prompt_tokens, max_gen_len, temperature, top_p, logprobs, **options)
        return [
            {"generation": {"role": "assistant", "content": c.text}, **describe_completion(c, self.tokenizer)}
            for c in completions
        ]

    def score(self, texts: abc.Sequence[str], *, stride: int | None = None) -> list[Score]:
        """How likely the model finds each text: see `engine.scoring.score`."""
        return score(self.engine, texts, stride=stride)

    def embed(self, texts: abc.Sequence[str], pooling: Pooling = "last") -> Tensor:
        """A vector for each text, float32 (texts, dim): see `engine.scoring.embed`."""
        return embed(self.engine, texts, pooling)
