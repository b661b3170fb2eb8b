"""The subjects of the benchmark: this package, and the peers that it is compared with, of the same sizes.

Knows how each is built and run (llama.cpp is in a file of its own); knows no clock. `transformers` is imported only
when its model is built.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from .._util.packages import find_missing, missing_error
from ..accelerate.accelerator import accelerate
from ..accelerate.fast_model import FastModel
from ..accelerate.quantization import Quantization
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.fit import check_memory
from ..checkpoints.hf_config_writing import config_of
from ..checkpoints.loader import PackWeight, build_on_meta, load_model, place_tensor
from ..checkpoints.schema import tensor_shapes
from ..errors import LlamaError, shorten
from ..generation import PREFILL_CHUNK, Llama, open_model
from ..model import ModelArgs, Transformer
from ..parallel import Place
from ..tokenizer import Tokenizer
from .llama_cpp import LlamaCppSubject
from .measure import Subject

PEERS = ("transformers", "default", "plain", "meta", "products", "llama.cpp")
PACKAGES = {  # modules that a peer imports: their names in pip
    "transformers": {"transformers": "transformers"},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
}
Product = Callable[[Tensor], Tensor]
LINEAR = (ColumnParallelLinear, RowParallelLinear)
CACHES = ("cache_k", "cache_v")  # names of buffers
STD = 0.02  # standard deviation of random weights


class ModelSubject(Subject, Protocol):
    """A subject that has weights."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decoding step reads on this rank."""


class NoText(Tokenizer):
    """A tokenizer for a model without text. No token stops generation, so that its length is known."""

    def __init__(self) -> None:
        self.stop_tokens: set[int] = set()

    def decode_bytes(self, token: int) -> bytes:
        return b""


@dataclass(frozen=True)
class LlamaSubject:
    """This package: `Llama.stream`."""

    name: str
    llama: Llama

    @property
    def weight_bytes(self) -> int:
        return count_weight_bytes(self.llama.model, self.llama.model.tok_embeddings)

    def run(self, prompts: list[list[int]], gen: int) -> Iterator[list[int]]:
        for steps in self.llama.stream(prompts, gen, temperature=0):
            yield [step.token for step in steps]


@dataclass(frozen=True)
class MetaSubject:
    """Meta's algorithm for prompts of different lengths (llama3's `generation.py`), on the plain model.

    A first pass prefills all prompts up to the end of the shortest. From there every step feeds one token of each row,
    also those of longer prompts. Logits of every position are computed. The first tokens are yielded when the longest
    prompt has got one.
    """

    model: Transformer
    name: str = "meta"

    @property
    def weight_bytes(self) -> int:
        return count_weight_bytes(self.model, self.model.tok_embeddings)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], gen: int) -> Iterator[list[int]]:
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        padded = [prompt + [0] * (longest + gen - len(prompt)) for prompt in prompts]
        tokens = torch.tensor(padded, device=self.model.norm.weight.device)  # (B, longest + gen)
        start = 0
        for position in range(shortest, longest + gen):
            logits = self.model(tokens[:, start:position], start)  # (B, T, vocab_size)
            next_tokens = logits[:, -1].argmax(-1)  # (B)
            in_prompt = torch.tensor([position < len(prompt) for prompt in prompts], device=tokens.device)
            tokens[:, position] = torch.where(in_prompt, tokens[:, position], next_tokens)
            start = position
            if position >= longest:
                yield tokens[:, position].tolist()


@dataclass(frozen=True)
class TransformersSubject:
    """transformers' own model, with its dynamic cache. Prompts of different lengths are padded on the left."""

    model: Any  # a PreTrainedModel
    name: str = "transformers"

    @property
    def weight_bytes(self) -> int:
        return count_weight_bytes(self.model, self.model.get_input_embeddings())

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], gen: int) -> Iterator[list[int]]:
        longest, device = max(map(len, prompts)), self.model.device
        pads = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)], device=device)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)  # (B, T)
        past = None
        for _ in range(gen):
            padding: dict[str, Tensor] = {}
            if any(pads):  # without padding, transformers is faster if it gets no mask
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
                padding = {"attention_mask": mask, "position_ids": positions}
            out = self.model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1, **padding)
            tokens, past = out.logits[:, -1:].argmax(-1), out.past_key_values  # (B, 1)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            yield tokens[:, 0].tolist()


@dataclass(frozen=True)
class ProductsSubject:
    """Only the products with a model's matrices, with as many rows a pass as the model has: a bound for its speed.

    Results are dropped, and nothing is exchanged between ranks.
    """

    model: Transformer
    name: str = "products"

    @property
    def weight_bytes(self) -> int:
        return count_weight_bytes(self.model, self.model.tok_embeddings)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], gen: int) -> Iterator[list[int]]:
        args, mp_size = self.model.params, get_model_parallel_world_size()
        new_ones = partial(torch.ones, dtype=self.model.dtype, device=self.model.device)
        products, output = list_products(self.model)
        widths = {"wo": args.n_heads * args.head_size // mp_size, "w2": args.hidden_dim // mp_size}

        def multiply(rows: int) -> None:
            for name, product in products:
                product(new_ones((rows, widths.get(name, args.dim))))

        tokens = sum(map(len, prompts))
        for start in range(0, tokens, PREFILL_CHUNK):
            multiply(min(PREFILL_CHUNK, tokens - start))
        for step in range(gen):
            if step > 0:
                multiply(len(prompts))
            logits = output(new_ones((len(prompts), args.dim)))
            yield logits.argmax(-1).tolist()


def list_products(model: Transformer) -> tuple[list[tuple[str, Product]], Product]:
    """(the products with the matrices of all layers, by the last part of their names; that with the output's matrix).

    The fast form's where there is one, else torch's.
    """
    if isinstance(model.fast, FastModel):
        network = model.fast.network
        return [(name, linear.product) for name, linear in network.linears], network.output.product
    modules = [(path.rpartition(".")[2], module) for path, module in model.layers.named_modules()]
    matrices = [(name, module.weight) for name, module in modules if isinstance(module, LINEAR)]
    return [(name, partial(F.linear, weight=weight)) for name, weight in matrices], partial(
        F.linear, weight=model.output.weight
    )


def count_weight_bytes(model: nn.Module, embedding: nn.Module) -> int:
    """Bytes of this rank's parameters and buffers that a decoding step reads: all but caches and `embedding`.

    Of the embedding, a step reads only a row for each token. It counts if it is the output layer's matrix too.
    """
    if isinstance(model, Transformer) and isinstance(model.fast, FastModel):
        return model.fast.weight_bytes
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        if module is not embedding:
            named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            tensors |= {id(tensor): tensor for name, tensor in named if name not in CACHES}
    return sum(tensor.nbytes for tensor in tensors.values())


def iterate_random_tensors(shapes: Mapping[str, Sequence[int]], place: Place) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of these shapes, created one at a time; the same in every run."""
    generator = torch.Generator(place.device).manual_seed(0)
    for name, shape in shapes.items():
        new = partial(torch.empty, shape, dtype=place.dtype, device=place.device)
        yield name, new().fill_(1) if len(shape) == 1 else new().normal_(0, STD, generator=generator)


def iterate_tensors(args: ModelArgs, place: Place, checkpoint: Checkpoint | None) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of a whole model, one at a time: the checkpoint's, or random ones where there is none."""
    if checkpoint is None:
        return iterate_random_tensors(tensor_shapes(args), place)
    return ((name, checkpoint.part(name).to(place.dtype)) for name in tensor_shapes(args))


def build_random_model(args: ModelArgs, place: Place, take: PackWeight | None = None) -> Transformer:
    """A Transformer with random weights, the same in every run. take: as of `load_model`."""
    model = build_on_meta(args)
    state_dict = model.state_dict()  # of this rank
    for name, weight in iterate_random_tensors({name: state_dict[name].shape for name in tensor_shapes(args)}, place):
        place_tensor(model, name, weight)
        del weight
        if take is not None:
            take(model, name, None)
    return model


def in_default_form(model: Transformer) -> Transformer:
    """Give a model the form that `Llama.build` gives it by default: neither compiled nor quantized."""
    accelerate(model, list(tensor_shapes(model.params)))
    return model


def build_peers(
    names: Sequence[str],
    ours: Transformer,
    place: Place,
    ckpt_dir: str | None,
    quantization: Quantization | None = None,
    adapter_dir: str | None = None,
) -> list[ModelSubject]:
    """The peers of these names, with the sizes of `ours`, in the order of `names`.

    They have the checkpoint's weights if there is one; transformers always has random weights. quantization: of
    llama.cpp's matrices. Raises LlamaError if the peers don't fit in memory beside `ours`.
    """
    args = ours.params
    if names:
        models = 1 + len({"plain" if name == "meta" else name for name in names} - {"products"})
        check_memory(args, replace(place, world_size=models * place.world_size))
    checkpoint = None if ckpt_dir is None else open_model(ckpt_dir, adapter_dir, place.dtype)
    peers: dict[str, ModelSubject] = {"products": ProductsSubject(ours)}
    if "transformers" in names:
        peers["transformers"] = TransformersSubject(build_random_transformers(args, place))

    def build_plain() -> Transformer:
        return build_random_model(args, place) if checkpoint is None else load_model(checkpoint, args, place)

    if "default" in names:
        peers["default"] = LlamaSubject("default", Llama(in_default_form(build_plain()), NoText()))
    if "plain" in names or "meta" in names:
        plain = build_plain()
        twin = copy.deepcopy(plain, {id(weight): weight for weight in plain.parameters()})  # same weights, own cache
        peers |= {"plain": LlamaSubject("plain", Llama(plain, NoText())), "meta": MetaSubject(twin)}
    if "llama.cpp" in names:
        tensors = iterate_tensors(args, place, checkpoint)
        peers["llama.cpp"] = LlamaCppSubject(args, place.dtype, quantization, tensors)
    return [peers[name] for name in names]


def check_peers(
    names: Sequence[str],
    place: Place,
    peers: Sequence[str] = PEERS,
    packages_of: Mapping[str, Mapping[str, str]] = PACKAGES,
) -> None:
    """Raise LlamaError for peers that are unknown, or can't run here. packages_of: by peer, as in PACKAGES."""
    for name in names:
        if name not in peers:
            raise LlamaError(f"--compare has {shorten(name)}, expected one or more of {', '.join(peers)}")
        packages = packages_of.get(name, {})
        if packages and place.world_size > 1:
            raise LlamaError(
                f"--compare {name} runs in one process, and {place.world_size} are here: leave out torchrun, or "
                "compare with plain"
            )
        if missing := find_missing(*packages):
            raise missing_error(f"--compare {name}", *(packages[module] for module in missing))
    if "llama.cpp" in names and place.device.type != "cpu":
        raise LlamaError(f"--compare llama.cpp runs on the CPU, and this on {place.device}: add --device cpu")


def build_random_transformers(args: ModelArgs, place: Place) -> Any:
    """transformers' model for causal language modelling, of these sizes, with random weights."""
    import transformers  # here, since it takes seconds

    config = transformers.AutoConfig.for_model(**config_of(args, {}, place.dtype))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(place.dtype).to_empty(device=place.device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, STD) if parameter.ndim > 1 else parameter.data.fill_(1)
    if args.tied_embeddings:  # to_empty has made two tensors of them
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with torch.device(place.device):  # its table of angles was on the meta device too
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model
