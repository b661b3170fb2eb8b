"""Llama: a model, its tokenizer, and text made with them.

One primitive: `Llama.stream` yields tokens as they are made; `generate`, `text_completion` and `chat_completion` drain
it. Knows no file format and no layer of the network.
"""

import hashlib
from collections import Counter, abc
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from . import parallel
from ._util.validate import check_count, check_list, check_seed, check_texts
from .accelerate.accelerator import Acceleration
from .accelerate.quantization import Quantization, bits_of
from .checkpoints.fit import check_draft, check_memory, check_vocabulary
from .checkpoints.loader import fetch_checkpoint, prepare_model
from .checkpoints.side_files import find_tokenizer
from .engine.beam_search import Beams, beam_search
from .engine.engine import Engine, OutputOptions
from .engine.outputs import ChatPrediction, Completion, CompletionPrediction, best_of_each, details, drained
from .engine.request_checks import check_best_of, check_prompts, check_speculation, check_token_ids
from .engine.scoring import Pooling, Score, embed, score
from .engine.sequence import Sequence, Step
from .engine.speculative import SPECULATE_K, Drafting, looking_up, speculated
from .engine.stop_strings import StopFinder
from .model import Transformer
from .sampling import processed, sample_top_p
from .settings import Options, RowOptions, Settings, Streamed, Wanted, settings_of_rows
from .tokenization.chat_template import make_formatter
from .tokenization.hf_tokenizer import open_tokenizer
from .tokenization.protocol import AnyTokenizer
from .tokenizer import Dialog, Message

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Step", "sample_top_p"]

PREFILL_CHUNK = 2048  # tokens of prompts in one forward pass


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
        draft_ckpt_dir: str | Path | None = None,
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
        draft_ckpt_dir: a smaller model of the same vocabulary, to propose tokens; see `stream`.
        """
        acceleration = Acceleration(quantization, compile)
        place = parallel.initialize(model_parallel_size, device, None if dtype == "auto" else dtype)
        smaller = [] if draft_ckpt_dir is None else [draft_ckpt_dir]
        directories = [fetch_checkpoint(one) for one in (ckpt_dir, *smaller)]
        today = parallel.broadcast_object(datetime.now())  # for chat templates that tell the model
        with parallel.together():
            check_count("max_seq_len", max_seq_len)
            check_count("max_batch_size", max_batch_size)
            check_count("prefill_chunk", prefill_chunk)
            check_seed(seed)
            sizes = max_seq_len, max_batch_size
            found, *drafts = [prepare_model(one, place, acceleration, *sizes, dtype == "auto") for one in directories]
            tokenizer = open_tokenizer(tokenizer_path or find_tokenizer(found.checkpoint))
            check_vocabulary(found.args, tokenizer)
            for one in drafts:
                check_draft(one.checkpoint.directory, one.args.vocab_size, found.args.vocab_size)
            beside = sum(sum(one.memory) for one in drafts)
            check_memory(found.args, found.place, bits_of(found.acceleration.quantization), beside)
        model, draft = found.load(), next((one.load() for one in drafts), None)
        return Llama(model, tokenizer, seed=seed, today=today, prefill_chunk=prefill_chunk, draft=draft)

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
        self.engine = Engine(model, prefill_chunk)
        self.draft = draft
        self._drafting = None if draft is None else Drafting(draft, prefill_chunk)
        self._seed = seed
        self._times_given: Counter[bytes] = (
            Counter()
        )  # how often each prompt was given, so that asking again draws anew

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
        rows: abc.Sequence[RowOptions | None] | None = None,
        lookup_ngram: int | None = None,
        speculate_k: int = SPECULATE_K,
        **options: Unpack[Options],
    ) -> Iterator[list[Step]]:
        """Generate from each prompt, yielding after every forward pass one `Step` for each row still going.

        max_gen_len: tokens a row gets at most (None: what fits in max_seq_len). temperature: 0 takes the likeliest
        token. top_p: in (0, 1]. echo: the first list yielded holds the prompts' own tokens. Rows draw from chance of
        their own, made from the seed, the prompt, and how often this Llama was given that prompt; not from neighbours.
        A prompt that fills max_seq_len gets no token, and so no step.

        n: rows from each prompt, which share its prefill. top_logprobs: tell so many of the likeliest tokens each time.
        options: further settings, of all rows; see `Settings`. rows: those of single prompts, instead of these.
        lookup_ngram: look in the text so far for its last so many tokens, and try the up to speculate_k that followed
        there all in one pass: the same tokens, in fewer passes, each with several steps of a row. See `acceptance`. A
        Llama with a draft model tries what that says, unless lookup_ngram is given.
        Raises LlamaError, before any forward pass, for arguments that can't work.
        """
        shared = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, **options}
        made, output = (
            self.rows(prompt_tokens, n, shared, rows, top_logprobs),
            OutputOptions(logprobs, echo, top_logprobs),
        )
        return self.steps(made, output, lookup_ngram, speculate_k)

    @property
    def acceptance(self) -> float | None:
        """Of the tokens that the last call proposed, the share that the model chose; None where none was proposed."""
        return self.engine.kept / self.engine.proposed if self.engine.proposed else None

    def generate(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **wanted: Unpack[Wanted],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Token ids generated for each prompt, cut before the first stop, and their logprobs where asked for.

        Arguments and errors as `complete`. With echo, the prompt's tokens come first; with both, so do their logprobs
        (0.0 for the first, which nothing predicts).
        """
        if echo and logprobs:
            wanted["prompt_logprobs"] = True
        found = self.complete(prompt_tokens, max_gen_len, temperature, top_p, logprobs, **wanted)
        tokens = [(one.prompt if echo else []) + one.tokens for one in found]
        chances = [((one.prompt_logprobs if echo else None) or []) + (one.logprobs or []) for one in found]
        return tokens, chances if logprobs else None

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
        **streamed: Unpack[Streamed],
    ) -> list[Completion]:
        """Whole answers, with all that is known of them: n to the first prompt, then n to the second ...

        Arguments and errors of `stream`. best_of: make so many answers, of which the n of the highest mean logprob come
        back, the best first. prompt_logprobs: tell those of the prompts' tokens too. num_beams: above 1, search for the
        likeliest answers, and give num_return_sequences to each prompt; see `beams.Beams`.
        """
        with parallel.together(parallel.group()):
            check_count("n", n)
            if best_of is not None:
                check_best_of(best_of, n)
            beams = Beams(num_beams, length_penalty, early_stopping, num_return_sequences)
            if num_beams == 1:
                beams.check_unused()
            else:
                shared = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, **streamed}
                others = {"n": n > 1, "best_of": best_of, "rows": shared.pop("rows", None)}
                others |= {name: shared.pop(name, None) for name in ("top_logprobs", "lookup_ngram")}
                shared.pop("speculate_k", None)
                (settings,) = settings_of_rows(1, shared, None)
                beams.check_with(settings, {**others, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs})
        if num_beams > 1:
            return self._searched(prompt_tokens, beams, settings)
        made = best_of or n
        given = (prompt_tokens, max_gen_len, temperature, top_p, logprobs or prompt_logprobs or best_of is not None)
        stream = self.stream(*given, prompt_logprobs, n=made, **streamed)
        found = drained(stream, prompt_tokens, made, prompt_logprobs)
        if best_of is not None:
            found = best_of_each(found, made, n)
        return found if logprobs else [replace(one, logprobs=None) for one in found]

    def text_completion(
        self,
        prompts: abc.Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **wanted: Unpack[Wanted],
    ) -> list[CompletionPrediction]:
        """Go on from each prompt; `complete` says what else may be asked for.

        With logprobs, "tokens" (their texts) and "logprobs" come too; with echo, each begins with its prompt.
        """
        with parallel.together(parallel.group()):
            check_texts(prompts)
            prompt_tokens = [self.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
        if echo and logprobs:
            wanted["prompt_logprobs"] = True
        found = self.complete(prompt_tokens, max_gen_len, temperature, top_p, logprobs, **wanted)
        lead = len(self.tokenizer.encode("", bos=True, eos=False))  # the prompts' begin_of_text
        results: list[CompletionPrediction] = []
        for one in found:
            before = self.tokenizer.decode(one.prompt[lead:]) if echo else ""
            results.append({"generation": before + one.text, **details(one, self.tokenizer, echo)})
        return results

    def chat_completion(
        self,
        dialogs: abc.Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **wanted: Unpack[Wanted],
    ) -> list[ChatPrediction]:
        """The assistant's next message in each dialog. With logprobs, "tokens" and "logprobs" come too."""
        with parallel.together(parallel.group()):
            check_list("dialogs", dialogs)
            prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        found = self.complete(prompt_tokens, max_gen_len, temperature, top_p, logprobs, **wanted)
        return [
            {"generation": {"role": "assistant", "content": one.text}, **details(one, self.tokenizer)} for one in found
        ]

    def score(self, texts: abc.Sequence[str], *, stride: int | None = None) -> list[Score]:
        """How likely the model finds each text: see `scoring.score`."""
        return score(self, texts, stride=stride)

    def embed(self, texts: abc.Sequence[str], pooling: Pooling = "last") -> Tensor:
        """A vector for each text, float32 (texts, dim): see `scoring.embed`."""
        return embed(self, texts, pooling)

    # --- how it is done ---------------------------------------------------------------------------------------------

    def rows(
        self,
        prompt_tokens: abc.Sequence[abc.Sequence[int]],
        n: int,
        shared: dict[str, Any],
        own: abc.Sequence[RowOptions | None] | None,
        top_logprobs: int,
    ) -> list[Sequence]:
        """n rows to each prompt. Raises LlamaError for what can't be."""
        with parallel.together(parallel.group()):
            check_count("n", n)
            check_prompts(prompt_tokens, self.model.params, n)
            settings = settings_of_rows(len(prompt_tokens), shared, own)
            check_token_ids(settings, top_logprobs, self.model.params.vocab_size)
        prompts = [[int(token) for token in prompt] for prompt in prompt_tokens]
        pairs = zip(prompts, settings, strict=True)
        return [self._row(i * n + j, prompt, one, j) for i, (prompt, one) in enumerate(pairs) for j in range(n)]

    def steps(
        self, rows: list[Sequence], output: OutputOptions, lookup_ngram: int | None, speculate_k: int, cached: int = 0
    ) -> Iterator[list[Step]]:
        """The rows' steps, with proposals where there are any. cached: see `Engine.run`."""
        with parallel.together(parallel.group()):
            check_speculation(lookup_ngram, speculate_k)
        propose = self._drafting if lookup_ngram is None else looking_up(lookup_ngram)
        if propose is None:
            return self.engine.run(rows, output, cached)
        return speculated(self.engine, rows, output, propose, speculate_k, cached)

    def _searched(
        self, prompt_tokens: abc.Sequence[abc.Sequence[int]], beams: Beams, settings: Settings
    ) -> list[Completion]:
        """The best beams of the first prompt, then of the second ..."""
        with parallel.together(parallel.group()):
            check_token_ids([settings], 0, self.model.params.vocab_size)
        stops = self._stops(settings)
        process = partial(processed, settings=settings, stops=stops) if settings.changes_logits else None
        most, chunk = settings.max_gen_len or self.model.params.max_seq_len, self.engine.prefill_chunk
        self.engine.take_cache()
        found = beam_search(self.model, prompt_tokens, beams, most, stops, process, chunk)
        return [
            Completion(list(prompt), b.tokens, self.tokenizer.decode(b.tokens), b.finish_reason, b.stop, score=b.score)
            for prompt, best in zip(prompt_tokens, found, strict=True)
            for b in best
        ]

    def _stops(self, settings: Settings) -> frozenset[int]:
        """The tokens that end a row."""
        return frozenset(self.tokenizer.stop_tokens) | {*settings.stop_token_ids}

    def _row(self, index: int, prompt: list[int], settings: Settings, copy: int) -> Sequence:
        """copy: which of the rows from the same prompt it is."""
        if settings.seed is None:
            key = hashlib.blake2b(repr((self._seed, prompt)).encode(), digest_size=16).digest()
            self._times_given[key] += 1
            key += b"%d" % self._times_given[key]
        else:
            key = repr((settings.seed, prompt, copy)).encode()
        chance = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
        room = self.model.params.max_seq_len - len(prompt)
        return Sequence(
            index=index,
            prompt=prompt,
            settings=settings,
            stops=self._stops(settings),
            left=room if settings.max_gen_len is None else min(room, settings.max_gen_len),
            decoder=self.tokenizer.stream_decoder(),
            generator=torch.Generator().manual_seed(chance),
            finder=StopFinder(settings.stop),
            cached=len(prompt),
        )
