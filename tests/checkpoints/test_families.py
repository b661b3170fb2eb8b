"""Checkpoints as others write them, read directly on 1, 2, 4 and 8 ranks: their logits are those of `transformers`.

Every kind of model that Hugging Face's layout holds is saved by transformers itself; Meta's layout is written here from
its description. The sizes that `llama.checkpoints.schema` states are compared with what such models really have.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, hidden_size, neighbours, to_meta
from family_program import LENGTH, PROMPTS, SHORT, SIZES, STEPS, compute
from rank_pool import RankPool
from tiny_families import SWITCH, WINDOW, make_model, rope
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama.checkpoints.convert import convert
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.schema import memory_needed, permute_rotary, tensor_shapes
from llama.model import ModelArgs, Transformer
from llama.parallel import Place

WAYS = ("whole", "whole through the cache", "token by token", "ragged rows")
CONVERTED_WAYS = ["whole", "token by token"]
FAST_WAYS = {1: WAYS, 2: WAYS[-1:]}  # in which the fast form is compared too, on so many ranks
FEW, MANY = (1, 2), (4, 8)  # ranks; many of them take minutes
Logits = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A model of `transformers`. older: its config.json has the older keys. edits: keys that are set at last."""

    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    older: bool = False
    edits: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"


ORIGINAL = {"original_max_position_embeddings": SWITCH}
LONGER = {"max_position_embeddings": 4 * SWITCH}
ROPES = {
    "unscaled": rope("default", 1000.0),
    "linear": rope("linear", factor=3.0),
    "dynamic": rope("dynamic", factor=2.5),
    "llama3": rope("llama3", factor=8.0, low_freq_factor=0.1, high_freq_factor=1.0, **ORIGINAL) | LONGER,
    "yarn": rope("yarn", 10.0, factor=4.0, beta_slow=0.25, **ORIGINAL) | LONGER,
    "yarn untruncated": rope("yarn", 10.0, factor=4.0, beta_fast=0.9, beta_slow=0.25, truncate=False, **ORIGINAL),
    "yarn mscale": rope("yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.4, **ORIGINAL),
    "yarn attention": rope("yarn", factor=4.0, attention_factor=1.7, beta_fast=3, **ORIGINAL),
}
KINDS = {
    "llama MHA": Kind(config={"num_key_value_heads": 8, "rms_norm_eps": 0.1}),
    "llama GQA": Kind(config={"num_key_value_heads": 4}),
    "llama GQA replicated": Kind(),
    "llama MQA": Kind(config={"num_key_value_heads": 1}, older=True),
    "llama tied": Kind(config={"tie_word_embeddings": True}),
    "llama biases": Kind(config={"attention_bias": True, "mlp_bias": True}),
    "llama mlp bias": Kind(config={"mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama head_dim": Kind(config={"head_dim": 24}),
    "llama dynamic biases": Kind(config={"attention_bias": True, "head_dim": 6, **ROPES["dynamic"]}),
    **{f"llama {name}": Kind(config=rope) for name, rope in ROPES.items()},
    **{f"llama {name} older": Kind(config=rope, older=True) for name, rope in ROPES.items()},
    "llama yarn from the longest": Kind(config=rope("yarn", factor=4.0), older=True),
    "llama yarn by the lengths": Kind(config=rope("yarn", factor=None, **ORIGINAL) | LONGER),
    "llama yarn outer": Kind(config=rope("yarn", factor=4.0) | LONGER, older=True, edits=ORIGINAL),
    "llama yarn twice": Kind(
        config=rope("yarn", factor=4.0, original_max_position_embeddings=32) | LONGER, older=True, edits=ORIGINAL
    ),
    "llama sharded": Kind(config={"num_key_value_heads": 8}, max_shard_size="60KB"),
    "llama bfloat16": Kind(dtype=torch.bfloat16),
    "llama float16": Kind(dtype=torch.float16, older=True),
    "mistral window": Kind("mistral", {"sliding_window": 4}),
    "mistral window older": Kind("mistral", {"sliding_window": SHORT, "num_key_value_heads": 4}, older=True),
    "mistral without": Kind("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral dynamic window": Kind("mistral", {"sliding_window": 4, **ROPES["dynamic"]}),
    "qwen2": Kind("qwen2", {"num_key_value_heads": 8}),
    "qwen2 window": Kind("qwen2", WINDOW),
    "qwen2 window older": Kind("qwen2", WINDOW | ROPES["yarn"], older=True),
    "qwen2 window everywhere": Kind("qwen2", WINDOW | {"max_window_layers": 0}, older=True),
    "qwen2 window unused": Kind("qwen2", older=True, edits={"sliding_window": 4, "max_window_layers": 0}),
    "qwen2 tied": Kind("qwen2", {"tie_word_embeddings": True}, max_shard_size="60KB"),
    "qwen3 head_dim": Kind("qwen3", {"head_dim": 24}),
    "qwen3 attention bias": Kind("qwen3", {"head_dim": 12, "attention_bias": True, **WINDOW}, older=True),
    "qwen3 tied yarn": Kind("qwen3", {"head_dim": 16, "tie_word_embeddings": True, **ROPES["yarn"]}, older=True),
}


def write_hf(directory: Path, kind: Kind, seed: int) -> None:
    model = make_model(kind.family, kind.config, seed).to(kind.dtype)
    model.save_pretrained(directory, max_shard_size=kind.max_shard_size)
    values = json.loads((directory / "config.json").read_text())
    if kind.older:
        theta = values.pop("rope_parameters")["rope_theta"]
        values.pop("layer_types", None)
        values |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": values.pop("dtype")}
        keys = dict(kind.config.get("rope_parameters", {"rope_type": "default"}))
        if (spelled := keys.pop("rope_type")) != "default":
            keys.pop("rope_theta")
            values["rope_scaling"] = {"rope_type" if spelled == "llama3" else "type": spelled, **keys}
    (directory / "config.json").write_text(json.dumps({**values, **kind.edits}))


def run_alone(model: PreTrainedModel, tokens: Tensor, prompt: int) -> Tensor:
    """Logits of one row, a prompt and then single tokens, by transformers' own cache."""
    model, past, found, start = copy.deepcopy(model), None, [], 0  # a `dynamic` one remembers the longest it has seen
    for end in range(prompt, len(tokens) + 1):
        answer = model(input_ids=tokens[None, start:end], past_key_values=past, use_cache=True)
        past, start = answer.past_key_values, end
        found.append(answer.logits[0])
    return torch.cat(found)


@torch.no_grad()
def expected_logits(model: PreTrainedModel, rows: Tensor) -> Logits:
    """The expected results of family_program.py, in each of its ways."""
    texts = [rows[:1, :length] for length in (SHORT, LENGTH)]
    whole = torch.cat([copy.deepcopy(model)(input_ids=text, use_cache=False).logits[0] for text in texts])
    pairs = zip(rows, PROMPTS, strict=True)
    ragged = torch.cat([run_alone(model, row[: prompt + STEPS], prompt) for row, prompt in pairs])
    return dict(zip(WAYS, (whole, whole, run_alone(model, rows[0], 1), ragged), strict=True))


@dataclass(frozen=True)
class Meta:
    """A model in Meta's layout. config: the same sizes in the keys of `transformers`."""

    shards: int
    config: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    embedding_dim: int = 0  # along which the embedding is divided


META_SIZES = ModelArgs(64, 2, 8, 2, 96, 32, 1.3, 1e-5, 500000)
OLDER = {  # Llama 1 and 2: heads of their own, a vocabulary that only the tokenizer counted, a base that needed no name
    "config": {"vocab_size": 32000, "num_key_value_heads": 8, **rope("default", 10000.0)},
    "params": {"vocab_size": -1},
    "dropped": ("n_kv_heads", "rope_theta"),
    "embedding_dim": 1,
}
SCALED = rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
SCALED["rope_parameters"]["original_max_position_embeddings"] = 8192
METAS = {
    **{f"meta {n} shards": Meta(n) for n in (*FEW, *MANY)},
    **{f"meta older {n} shards": Meta(n, **OLDER) for n in (2, 4)},
    "meta scaled": Meta(2, SCALED, {"use_scaled_rope": True}),
    "meta tied": Meta(4, {"tie_word_embeddings": True}, dropped=("output.weight",)),
    "meta tied repeated": Meta(8, {"tie_word_embeddings": True}),
}


def shard(tensors: dict[str, Tensor], rank: int, count: int, kv_heads: int, embedding_dim: int) -> dict[str, Tensor]:
    """The tensors of consolidated.RANK.pth of COUNT; with more ranks than key/value heads, neighbours share a head."""
    part = {}
    for name, tensor in tensors.items():
        layer, pieces, dim = name.split(".")[-2], count, 0
        if layer in ("wk", "wv"):
            pieces = min(count, kv_heads)
        elif layer in ("wo", "w2"):
            dim = 1
        elif layer == "tok_embeddings":
            dim = embedding_dim
        elif layer not in ("wq", "w1", "w3", "output"):
            pieces = 1
        part[name] = tensor.chunk(pieces, dim)[rank * pieces // count].clone()
    return part


def write_meta(directory: Path, meta: Meta) -> PreTrainedModel:
    sizes = META_SIZES
    width = hidden_size(sizes.dim, sizes.multiple_of, sizes.ffn_dim_multiplier)
    config = {
        "hidden_size": sizes.dim,
        "intermediate_size": width,
        "rms_norm_eps": sizes.norm_eps,
        **rope("default", sizes.rope_theta),
    }
    model = make_model("llama", config | meta.config, 7)
    kv_heads = model.config.num_key_value_heads
    tensors = to_meta(model.state_dict(), replace(sizes, n_kv_heads=kv_heads))
    tensors["rope.freqs"] = torch.ones(4)
    keys = [f.name for f in fields(ModelArgs)[:9]]  # Meta's own, from dim to rope_theta
    params = {key: getattr(sizes, key) for key in keys} | meta.params
    directory.mkdir()
    kept = {name: value for name, value in params.items() if name not in meta.dropped}
    (directory / "params.json").write_text(json.dumps(kept))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in meta.dropped}
    for rank in range(meta.shards):
        part = shard(tensors, rank, meta.shards, kv_heads, meta.embedding_dim)
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")
    return model


@dataclass(frozen=True)
class World:
    """All models on disk, with the logits by transformers and those by ranks."""

    rows: Tensor
    directories: dict[str, Path]
    expected: Callable[[str], Logits]
    found: Callable[[str, int], Logits]


@pytest.fixture(scope="module")
def world(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("families")
    rows = torch.randint(1, 96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    directories = {name: root / name.replace(" ", "-") for name in (*KINDS, *METAS)}
    for seed, (name, kind) in enumerate(KINDS.items()):
        write_hf(directories[name], kind, seed)
        directories[to_meta_name(name)] = root / f"{directories[name].name}.meta"
        convert(directories[name], directories[to_meta_name(name)], "meta", mp_size=2)
    models = {name: write_meta(directories[name], meta) for name, meta in METAS.items()}

    @cache
    def expected(name: str) -> Logits:
        return expected_logits(models.get(name) or read_hf(directories[name]), rows)

    @cache
    def run(ranks: int) -> dict[str, Logits]:
        names = list(METAS if ranks == 8 else directories)
        jobs = [
            {"directory": str(directories[n])}
            | {"ways": WAYS if n in KINDS else WAYS[:1] if n in METAS else CONVERTED_WAYS}
            | {"fast": FAST_WAYS.get(ranks, ()) if n in KINDS else ()}
            for n in names
        ]
        done = pool.run(compute, rows, jobs, ranks=ranks if ranks > 1 else 0, timeout=600)
        return dict(zip(names, done.results[0], strict=True))

    def found(name: str, ranks: int) -> Logits:
        return run(ranks)[name]

    return World(rows, directories, expected, found)


def to_meta_name(name: str) -> str:
    return f"{name}, converted"


def read_hf(directory: Path) -> PreTrainedModel:
    read = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return read.eval()


@pytest.mark.parametrize("ranks", [*FEW, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_layout(world: World, kind: str, way: str, ranks: int) -> None:
    assert_close(world.found(kind, ranks)[way], world.expected(kind)[way])


@pytest.mark.parametrize(("ranks", "way"), [(ranks, way) for ranks, ways in FAST_WAYS.items() for way in ways])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_form(world: World, kind: str, way: str, ranks: int) -> None:
    assert_close(world.found(kind, ranks)[f"{way}, fast"], world.expected(kind)[way])


@pytest.mark.parametrize("ranks", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in MANY)])
@pytest.mark.parametrize("kind", METAS)
def test_meta_layout(world: World, kind: str, ranks: int) -> None:
    found = world.found(kind, ranks)
    assert_close(found["whole"], world.expected(kind)["whole"])
    assert bool(found["tied"]) == ("tied" in kind)


@pytest.mark.parametrize("ranks", [*FEW, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", CONVERTED_WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_converted_to_metas_layout(world: World, kind: str, way: str, ranks: int) -> None:
    assert_close(world.found(to_meta_name(kind), ranks)[way], world.expected(kind)[way])


@pytest.mark.parametrize("name", [to_meta_name(kind) for kind in KINDS])
@pytest.mark.parametrize("config_kept", [True, False])
def test_converted_to_hugging_faces_layout(world: World, name: str, config_kept: bool, tmp_path: Path) -> None:
    """With the config.json that came along from Hugging Face's layout, and from what Meta's layout says alone."""
    source, left_out = world.directories[name], () if config_kept else ("config.json",)
    shutil.copytree(source, tmp_path / "meta", ignore=shutil.ignore_patterns(*left_out))
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    expected = world.expected(name.removesuffix(", converted"))
    found = expected_logits(read_hf(tmp_path / "hf"), world.rows)
    for way in WAYS:
        assert_close(found[way], expected[way])


@pytest.mark.parametrize("name", METAS)
def test_metas_own_converted(world: World, name: str, tmp_path: Path) -> None:
    convert(world.directories[name], tmp_path / "hf", "hf")
    found = expected_logits(read_hf(tmp_path / "hf"), world.rows)
    assert_close(found["whole"], world.expected(name)["whole"])


def test_the_kinds_are_what_they_are_called(world: World) -> None:
    for name in ("llama sharded", "qwen2 tied"):
        assert len(list(world.directories[name].glob("*.safetensors"))) > 2
        assert (world.directories[name] / "model.safetensors.index.json").exists()
    for name, kind in KINDS.items():
        values = json.loads((world.directories[name] / "config.json").read_text())
        assert ("rope_parameters" in values, "rope_scaling" in values) == (not kind.older, kind.older)
    grown = world.expected("llama dynamic")
    assert not torch.allclose(grown["whole"][SHORT:], grown["token by token"], atol=0.1), "longer texts turn otherwise"


@pytest.mark.parametrize("ranks", [*FEW, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_needed_is_what_is_taken(world: World, kind: str, ranks: int) -> None:
    args = replace(open_checkpoint(world.directories[kind]).sizes, **SIZES)
    assert tuple(world.found(kind, ranks)["bytes"].tolist()) == memory_needed(args, ranks, torch.float32)


@pytest.mark.parametrize("kind", [*KINDS, *METAS])
def test_tensor_shapes_are_those_of_the_network(world: World, place: Place, kind: str) -> None:
    args = open_checkpoint(world.directories[kind]).sizes
    network = {name: tuple(tensor.shape) for name, tensor in Transformer(args).state_dict().items()}
    assert tensor_shapes(args) == {n: s for n, s in network.items() if n != "output.weight" or not args.tied_embeddings}


@pytest.mark.parametrize("more", [(), (5,)])
@pytest.mark.parametrize("head_dim", [2, 4, 6, 24, 128])
@pytest.mark.parametrize("heads", [1, 2, 7])
def test_rotary_orders(heads: int, head_dim: int, more: tuple[int, ...], generator: torch.Generator) -> None:
    halves = torch.randn(heads * head_dim, *more, generator=generator)
    pairs = permute_rotary(halves, head_dim, "meta")
    assert torch.equal(pairs, neighbours(halves, heads))
    assert torch.equal(permute_rotary(pairs, head_dim, "hf"), halves)
    assert torch.equal(permute_rotary(permute_rotary(halves, head_dim, "hf"), head_dim, "meta"), halves)
    for first in range(heads):
        for last in range(first + 1, heads + 1):
            rows = slice(first * head_dim, last * head_dim)
            assert torch.equal(permute_rotary(halves[rows], head_dim, "meta"), pairs[rows])
            assert torch.equal(permute_rotary(pairs[rows], head_dim, "hf"), halves[rows])
