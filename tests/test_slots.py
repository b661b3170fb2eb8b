"""Passes whose rows use the engine's slots of the KV cache, against the same passes by hand: to the last bit."""

import copy
import io
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import caches
from tiny import ARGS, write_checkpoint
from torch import Tensor

from llama import Llama, LlamaError, Transformer
from llama._util.slot_memory import SlotMemory
from llama._util.slots import Slots
from llama.accelerate.kernels import cpu
from llama.kv_cache import update
from llama.rotary import RopeScaling

FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "compiled": {"compile": True},
}
FAMILIES = {
    "plain": replace(ARGS, dim=64, n_heads=4, n_kv_heads=2),  # heads of 16, which have kernels
    "window": replace(ARGS, dim=64, n_heads=4, n_kv_heads=2, sliding_window=6, sliding_layers=(1,)),
    "small heads": ARGS,  # of 8 numbers, which have none
    "dynamic": replace(ARGS, rope_scaling=RopeScaling("dynamic", 2.0, original_max_position_embeddings=8)),
}
PLACES = [[0, 1, 2], [4, 5, 6], [7, 0, 3], [2, 1, 0], [8, 6, 7]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Transformer]:
    folder = tmp_path_factory.mktemp("families")
    directories = {name: write_checkpoint(folder / name, args) for name, args in FAMILIES.items()}

    def build(family: str = "plain", **options: Any) -> Transformer:
        options = {"max_seq_len": 48, "max_batch_size": 3, "device": "cpu", "dtype": "float32", **options}
        model = Llama.build(directories[family], **options).model
        model.kv_cache.claim(build, 9, model.dtype, model.device)
        return model

    return build


def passes(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and first positions of passes that follow each other: a prompt's, ragged ones, of one token and more."""
    chance = torch.Generator().manual_seed(seed)
    starts, found = torch.zeros(3, dtype=torch.long), []
    for length in (7, 1, 1, 4, 1, 9, 1):
        found.append((torch.randint(0, 256, (3, length), generator=chance), starts.clone()))
        starts += torch.randint(1, length + 1, (3,), generator=chance)  # some positions are written again
    return found


@torch.no_grad()
def check(model: Transformer, exactly: bool = True) -> None:
    expected = [model(tokens, starts) for tokens, starts in passes(0)]
    assert not torch.equal(expected[1][0], expected[1][1])
    for places in PLACES:
        for (tokens, starts), logits in zip(passes(0), expected, strict=True):
            found = model(tokens, starts, slots=torch.tensor(places))
            assert torch.equal(found, logits) if exactly else torch.allclose(found, logits, atol=1e-5), places


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_passes_equal_those_by_hand(build: Callable[..., Transformer], form: str, family: str) -> None:
    # Where torch compiles the steps, it does for slots, and those by hand run as they are written.
    check(build(family, **FORMS[form]), exactly=form != "compiled" or cpu.library() is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_of_the_plain_text_equal_those_by_hand(build: Callable[..., Transformer], family: str) -> None:
    model = build(family)
    model.layers[0].register_forward_hook(lambda *_: None)
    check(model)


@torch.no_grad()
def test_engine_and_hand_dont_spoil_each_other(build: Callable[..., Transformer]) -> None:
    """Nor do two sets of slots: each goes on as if the others weren't there."""
    model = build()
    sets: list[Tensor | None] = [None, torch.tensor([4, 0, 2]), torch.tensor([5, 6, 7])]
    steps = [passes(seed) for seed in range(3)]
    fresh = [build() for _ in range(3)]
    for i in range(len(steps[0])):
        for seed, slots in enumerate(sets):
            assert torch.equal(model(*steps[seed][i], slots=slots), fresh[seed](*steps[seed][i]))


def test_neighbours_are_a_view(build: Callable[..., Transformer]) -> None:
    model = build("small heads")
    attention = model.layers[0].attention
    like = torch.zeros(1)
    keys, _, rows = Slots(model.kv_cache, torch.tensor([3, 4]), 3).caches(attention, like)
    assert rows is None
    x = torch.ones(2, 1, *keys.shape[2:])
    seen, _ = update(keys, keys, x, x, 5, 6)
    whole, _ = model.kv_cache.caches(attention, like)
    assert seen.data_ptr() == whole[3].data_ptr() and (whole[3:5, 5] == 1).all()


@pytest.mark.parametrize("wrapped", ["forward", "block"])
@torch.no_grad()
def test_layers_are_still_called_with_four_arguments(build: Callable[..., Transformer], wrapped: str) -> None:
    model = build()
    layer = model.layers[1].attention if wrapped == "forward" else model.layers[1]
    forward = layer.forward
    layer.forward = lambda x, start_pos, freqs_cis, mask: 0.5 * forward(x, start_pos, freqs_cis, mask)
    check(model)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([0, 1]), "expected a tensor of one for each of 3 rows"),
        (torch.tensor([0.0, 1.0, 2.0]), "expected a tensor of one for each of 3 rows"),
        (torch.tensor([0, 1, 9]), "expected different ones of the 9 that there are"),
        (torch.tensor([0, 1, -1]), "expected different ones"),
        (torch.tensor([0, 1, 1]), "expected different ones"),
    ],
)
def test_wrong_slots_are_refused(build: Callable[..., Transformer], slots: Tensor, message: str) -> None:
    model = build()
    with pytest.raises(LlamaError, match=message):
        model(torch.ones(3, 2, dtype=torch.long), 0, slots=slots)
    with pytest.raises(LlamaError, match="slots were given without start_pos"):
        model(torch.ones(3, 2, dtype=torch.long), slots=torch.arange(3))


@torch.no_grad()
def test_copies_continue_as_their_source(build: Callable[..., Transformer]) -> None:
    model = build()
    (tokens, starts), (step, _), *_ = passes(0)
    model(tokens, starts, slots=torch.tensor([0, 1, 2]))
    model.kv_cache.copy(1, 7, 7)
    expected = model(step[:1], 7, slots=torch.tensor([1]))
    assert torch.equal(model(step[:1], 7, slots=torch.tensor([7])), expected)
    model.kv_cache.copy(0, 7, 7)
    assert not torch.equal(model(step[:1], 7, slots=torch.tensor([7])), expected)


@torch.no_grad()
def test_copied_and_saved_models_have_no_slots(build: Callable[..., Transformer], tmp_path: Path) -> None:
    model = build()
    model(*passes(0)[0], slots=torch.arange(3))
    twin = copy.deepcopy(model)
    assert twin.kv_cache is not model.kv_cache and twin.kv_cache.n_slots == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).kv_cache.n_slots == 0
    assert caches(model) == [None] * 4, "calls by hand have made none"
    assert not [name for name in model.state_dict() if "cache" in name]


class Owner:
    """Whoever claims slots."""


@torch.no_grad()
def test_each_owner_has_slots_of_its_own(build: Callable[..., Transformer]) -> None:
    cache = build().kv_cache
    one, other = Owner(), Owner()
    assert cache.claim(one, 4, torch.float32, torch.device("cpu"))
    assert not cache.claim(one, 4, torch.float32, torch.device("cpu"))
    first = cache.generation
    assert cache.claim(other, 4, torch.float32, torch.device("cpu")) and cache.generation != first
    assert not cache.claim(one, 4, torch.float32, torch.device("cpu")) and cache.generation == first
    assert cache.claim(one, 4, torch.bfloat16, torch.device("cpu")) and cache.generation != first


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system takes no memory back")
def test_memory_is_taken_when_written_and_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    memory = SlotMemory((16, 4 << 20), torch.float32, torch.device("cpu"))  # 256 MiB
    assert resident() - before < 16 << 20, "nothing is written"
    assert not memory.tensor[3, :1000].any()
    memory.tensor[3] = 1
    assert resident() - before > 15 << 20
    memory.release(memory.tensor[3, 1000:])
    assert resident() - before < 8 << 20
    assert (memory.tensor[3, :1000] == 1).all(), "what is before stays"
    memory.release(memory.tensor[3, 5:6])
    assert memory.tensor[3, 5] == 1, "a part of a page stays"
