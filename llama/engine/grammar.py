"""Structured output: which tokens may follow an answer, so that its text has the form that was asked for.

A format is made a grammar, which the package llguidance compiles and follows; it is imported when the first format is
given. Knows tokenizers, formats and logits; knows no model, no sequence and no step.
"""

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._util.packages import find_missing, missing_error
from ..errors import LlamaError, to_one_line
from ..sampling import NEVER
from ..tokenization.protocol import AnyTokenizer
from .prefix_index import count_common
from .transfer import copy_to_device

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MOST_COMPILED = 32  # formats of one tokenizer that stay compiled
# Between the parts of JSON: nothing, a space, or a line's end and an indentation. With more, a model that has lost its
# way could write white space without end.
JSON_SPACE = r" |\n {0,32}"
# What a grammar may cost, in llguidance's units, so that nobody's mask takes seconds and no sequence over some 40 MB.
LIMITS: dict[str, Any] = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000}
LIMITS |= {"max_items_in_row": 500, "max_lexer_states": 20_000, "max_grammar_size": 200_000}
# Some schemas, such as many patterns that one text has to match, take hours and all memory; the limits don't tell. So a
# new grammar is first compiled by a process of its own, which is ended in time.
MOST_CPU_SECONDS, MOST_BYTES = 2, 1 << 30
CHECK = """
import json, resource, sys
grammar, limits, seconds, size = json.load(sys.stdin)
for limit, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (most, most))
from llguidance import LLMatcher, LLParserLimits
sys.stdout.buffer.write(LLMatcher.validate_grammar(grammar, limits=LLParserLimits(**limits)).encode())
"""
# By byte: its bits, the lowest first, as 8 booleans that are read as one number, since that is the fastest way.
BITS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool().view(torch.int64).flatten()
MISSING_HELP = "pip install 'llama-reference[grammar]' has it too"


def write_grammar(response_format: Mapping[str, Any]) -> str:
    """The format as a grammar in llguidance's notation. Raises LlamaError for some mistakes, and without it."""
    if find_missing("llguidance"):
        raise LlamaError(f"{missing_error('response_format', 'llguidance')} ({MISSING_HELP})")
    from llguidance import LLMatcher

    kind = response_format["type"]
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(response_format["grammar"])
    if kind == "regex":
        return LLMatcher.grammar_from_regex(response_format["regex"])
    if kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(escape, response_format["choice"])))
    schema = response_format["json_schema"]["schema"] if kind == "json_schema" else {"type": "object"}
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": JSON_SPACE})
    except ValueError as e:  # it is nested too deeply, or has too large a number
        raise LlamaError(f"response_format of type {kind}: {to_one_line(e)}") from None


def escape(text: str) -> str:
    """A regular expression for one text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def check_format(response_format: Mapping[str, Any]) -> None:
    """Raise LlamaError with llguidance's message for a format that it can't compile, and where it isn't installed."""
    if message := find_mistake(write_grammar(response_format)):
        raise LlamaError(f"response_format of type {response_format['type']}: {to_one_line(message)}")


@lru_cache(MOST_COMPILED)
def find_mistake(grammar: str) -> str:
    """What is wrong with a grammar whatever the vocabulary is; "" if nothing is."""
    task = json.dumps([grammar, LIMITS, MOST_CPU_SECONDS, MOST_BYTES]).encode()
    done = subprocess.run([sys.executable, "-P", "-c", CHECK], input=task, capture_output=True)
    if done.returncode > 0:
        return done.stderr.decode(errors="replace").rstrip().rpartition("\n")[2]
    if done.returncode < 0:  # a signal ended it
        return f"too complex: it can't be compiled in {MOST_CPU_SECONDS} seconds and {MOST_BYTES >> 20} MiB of memory"
    return done.stdout.decode()


def make_limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS, verbose_errors=False)


class Grammars:
    """Makes the matchers of one tokenizer's sequences. Formats are compiled once; those used last stay compiled."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._lock = Lock()  # guards what follows
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # by grammar; the one used last at the end

    def make_matcher(self, response_format: Mapping[str, Any]) -> "Matcher":
        """The matcher of a new sequence. What is wrong with the grammar, the matcher says."""
        grammar = write_grammar(response_format)
        with self._lock:
            compiled = self._compiled.pop(grammar, None) or self._compile(grammar)
            self._compiled[grammar] = compiled
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), self._tokenizer.n_words)

    def _compile(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLTokenizer

        if self._vocabulary is None:
            words = Words(self._tokenizer)
            self._vocabulary = words.vocabulary = LLTokenizer(
                words,  # type: ignore[arg-type]  # it has all that a TokenizerWrapper has
                n_vocab=len(words.tokens),
                eos_token=words.eos_token_id,
            )
        return LLMatcher(self._vocabulary, grammar, log_level=0, limits=make_limits())


class Words:
    """A tokenizer as llguidance wants it: the bytes of each id, and a function from text to ids.

    One further id, `n_words`, stands for every token that ends an answer: which those are differs between sequences.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self.vocabulary: LLTokenizer | None = None  # what llguidance made of this
        self.eos_token_id = tokenizer.n_words
        self.tokens = [*map(tokenizer.decode_bytes, range(tokenizer.n_words)), b"<|end of answer|>"]
        control = {token: name for name, token in tokenizer.special_tokens.items() if token < tokenizer.n_words}
        for token, name in control.items():
            self.tokens[token] = name.encode()
        self.special_token_ids = [*sorted(control), self.eos_token_id]  # none of which is text

    def __call__(self, text: str | bytes) -> list[int]:
        """The ids of a text that follows another one: where the grammar leaves one text, those that a model expects."""
        data = text if isinstance(text, bytes) else text.encode()
        for lead in ("", "\x02"):  # SentencePiece tokenizers put a space before a text, but none after such a byte
            ids = self._tokenizer.encode(lead + data.decode(errors="replace"), bos=False, eos=False)
            for start in range(min(len(ids), 3)):
                if b"".join(self.tokens[token] for token in ids[start:]) == data:
                    return ids[start:]
        return [] if self.vocabulary is None else self.vocabulary.greedy_tokenize(data.decode(errors="replace"))


class Matcher:
    """One sequence's place in its grammar.

    A sequence that is set back and computed again keeps its answer, and so its place.
    """

    def __init__(self, matcher: "LLMatcher", n_words: int):
        self._matcher = matcher
        self._n_words = n_words
        self._followed: list[int] = []  # the tokens that `_matcher` has consumed

    def mask(self, logits: Tensor, answer: list[int], stops: Collection[int]) -> Tensor:
        """Logits (vocab_size) after an answer: NEVER for tokens that lead out of the grammar.

        Tokens that end the answer are allowed where the grammar may end. An answer that has left the grammar already,
        which proposals may do, leaves the logits as they are: what is chosen there is never used. Raises LlamaError
        where the grammar gets too complex.
        """
        if not self._follow(answer):
            return logits
        allowed = self._find_allowed(logits.shape[-1], stops)
        return logits.where(copy_to_device(allowed, logits.device), NEVER)

    def _follow(self, answer: list[int]) -> bool:
        """Go to the end of an answer, from where the last one ends. Returns whether the grammar allows it."""
        common = count_common(self._followed, answer)
        if common < len(self._followed):
            self._matcher.rollback(len(self._followed) - common)
            del self._followed[common:]
        further = answer[common:]
        known = next((i for i, token in enumerate(further) if token >= self._n_words), len(further))
        count = self._matcher.try_consume_tokens(further[:known])
        self.check()
        self._followed += further[:count]
        return count == len(further)

    def _find_allowed(self, vocab_size: int, stops: Collection[int]) -> Tensor:
        """Which tokens may come next: booleans (vocab_size), on the CPU."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self.check()
        bits = BITS[packed.int()].view(torch.bool)
        may_end = bits[self._n_words].item()
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        known = min(vocab_size, self._n_words)
        allowed[:known] = bits[:known]
        allowed[[token for token in stops if token < vocab_size]] = may_end
        return allowed

    def check(self) -> None:
        """Raise LlamaError for what is wrong with the grammar in this vocabulary, or got too complex in this answer."""
        if self._matcher.is_error():
            raise LlamaError(f"response_format: {to_one_line(self._matcher.get_error())}")
