"""What test files share: the process group of one CPU process, tokenizers, and networks equal to transformers'.

The translation of weights and the rule of the hidden size are written here from the papers, not from `llama/`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads of tiny models wait for each other

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_pool import RankPool
from torch import Tensor
from vocabulary import BASE, SPECIALS, TOKENS, lines_of, write

from llama.model import ModelArgs, Transformer
from llama.parallel import Place, initialize, leave
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from running_server import Running
    from transformers import LlamaForCausalLM  # seconds to import: only who makes a twin pays them


@pytest.fixture(scope="session")
def place() -> Iterator[Place]:
    """This process alone, on the CPU, in float32. The groups that this made are taken down after the last test."""
    existed = dist.is_initialized()
    yield initialize(device="cpu", dtype=torch.float32)
    if not existed:
        leave()


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Runs functions on several ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def generator() -> torch.Generator:
    """Numbers that are the same in every run, whatever ran before."""
    return torch.Generator().manual_seed(2024)


CASES = {
    "grouped": ModelArgs(64, 2, 8, 2, 97, 16, 1.3, 1e-5, 500000, max_batch_size=4, max_seq_len=32),
    "every head its own": ModelArgs(48, 3, 4, None, 64, 32, None, 1e-6, 10000, max_batch_size=4, max_seq_len=32),
    "one for all": ModelArgs(32, 2, 4, 1, 71, 8, 0.9, 0.5, 100, max_batch_size=4, max_seq_len=32),
}


@dataclass(frozen=True)
class Twin:
    """One set of weights in both implementations."""

    ours: Transformer
    theirs: "LlamaForCausalLM"

    def tokens(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randint(self.ours.vocab_size, shape, generator=torch.Generator().manual_seed(seed))

    def expected(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.theirs(input_ids=tokens, use_cache=False).logits


def hidden_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    size = 4 * dim * 2 // 3
    size = size if multiplier is None else int(multiplier * size)
    return multiple_of * math.ceil(size / multiple_of)


def neighbours(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a head from halves (row j turns with row j + D/2) to neighbours (row 2j turns with row 2j + 1)."""
    first, second = weight.unflatten(0, (n_heads, 2, -1)).unbind(1)  # (heads, D/2, dim) each
    return torch.stack([first, second], dim=2).flatten(0, 2)


def to_meta(tensors: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Tensors with transformers' names -> the same with Meta's names and rotary layout."""
    names = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    for i in range(args.n_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        names |= {f"{attention}.{x}_proj": f"layers.{i}.attention.w{x}" for x in "qkvo"}
        names |= {
            f"{mlp}.{x}_proj": f"layers.{i}.feed_forward.w{n}" for x, n in {"gate": 1, "down": 2, "up": 3}.items()
        }
        names[f"model.layers.{i}.input_layernorm"] = f"layers.{i}.attention_norm"
        names[f"model.layers.{i}.post_attention_layernorm"] = f"layers.{i}.ffn_norm"
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads or args.n_heads}
    result = {}
    for name, tensor in tensors.items():
        new = names[name.removesuffix(".weight")]
        n_heads = heads.get(new[-2:])
        result[new + ".weight"] = tensor.clone() if n_heads is None else neighbours(tensor, n_heads)
    return result


def make_twin(args: ModelArgs) -> Twin:
    """Random weights of these sizes in both networks. Needs the process group: ask for the fixture `place` too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=hidden_size(args.dim, args.multiple_of, args.ffn_dim_multiplier),
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads or args.n_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rope_theta)},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = LlamaForCausalLM(config).eval()
    random = torch.Generator().manual_seed(args.dim)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            elif "embed" in name:
                weight.copy_(noise)
            else:  # twice the usual size: attention then has preferences, and so a wrong position shows
                weight.copy_(2 * noise / weight.shape[1] ** 0.5)
    ours = Transformer(replace(args))
    ours.load_state_dict(to_meta(theirs.state_dict(), args), strict=True)
    return Twin(ours, theirs)


def assert_close(actual: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """No element is further off than `share` of the range of the expected ones."""
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert float((actual.detach() - expected).abs().max()) <= share * float(expected.max() - expected.min())


def numbers_in(message: str) -> set[str]:
    """The whole numbers that a message names: "2" isn't in "32"."""
    return set(re.findall(r"-?\d+", message))


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def caches(model: Transformer) -> list[Tensor | None]:
    return [cache for layer in model.layers for cache in (layer.attention.cache_k, layer.attention.cache_v)]


@pytest.fixture(scope="module", params=CASES)
def twin(request: pytest.FixtureRequest, place: Place) -> Twin:
    return make_twin(CASES[request.param])


@pytest.fixture(scope="module")
def grouped(place: Place) -> Twin:
    return make_twin(CASES["grouped"])


@pytest.fixture
def fresh(grouped: Twin) -> Iterator[Transformer]:
    """A model whose cache was never used."""
    model = Transformer(replace(CASES["grouped"]))
    model.load_state_dict(grouped.ours.state_dict())
    yield model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write(tmp_path_factory.mktemp("vocabulary") / "tokenizer.model", lines_of(TOKENS)))


@pytest.fixture(scope="session")
def plain() -> tiktoken.Encoding:
    """The small vocabulary in tiktoken as it comes."""
    return tiktoken.Encoding(
        "plain",
        pat_str=Tokenizer.pat_str,
        mergeable_ranks={token: rank for rank, token in enumerate(TOKENS)},
        special_tokens={name: BASE + offset for name, offset in SPECIALS.items()},
    )


@pytest.fixture(scope="session")
def published() -> Tokenizer:
    path = os.environ.get("TOKENIZER_PATH")
    if not path:
        pytest.skip("TOKENIZER_PATH is unset")
    return Tokenizer(path)


@pytest.fixture(scope="session")
def server() -> "Iterator[Running]":
    """A server of the demo model that all tests share."""
    from running_server import build, start  # here, since other tests need no server

    with ExitStack() as stack:
        yield start(stack, build())


@pytest.fixture
def start_server() -> "Iterator[Callable[..., Running]]":
    """Starts servers with options of `ServerOptions`, which end with the test."""
    from running_server import build, start

    with ExitStack() as stack:
        yield lambda **options: start(stack, build(), **options)


@pytest.fixture(scope="session")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Running]":
    """A server of the demo model with a template that has tools."""
    from running_server import build_with_tools, start

    with ExitStack() as stack:
        yield start(stack, build_with_tools(tmp_path_factory.mktemp("tools")))
