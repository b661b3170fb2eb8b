"""Edits of a model with a fast form, in every way that a program may reach inside: each holds from the next call on.

The oracle is the same edit of a model that was never packed. Reading and saving leave nothing behind.
"""

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from tiny import ARGS, write_checkpoint
from torch import Tensor, nn

from llama import Llama, Transformer
from llama.accelerate.fast_model import FastModel
from llama.accelerate.kernels import cpu
from llama.accelerate.quantization import FloatMatrix, QuantizedMatrix
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.model import Attention, FeedForward, TransformerBlock
from llama.parallel import initialize

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")

OPTIONS = {"max_seq_len": 64, "max_batch_size": 2, "device": "cpu"}
LARGER = replace(ARGS, n_heads=4, n_kv_heads=2, qkv_bias=True, qk_norm=True)
PROMPTS = [[1, 2, 3, 4, 5], [9, 8]]
Edit = Callable[[Transformer], object]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("edits")
    cases = {"untied": LARGER, "tied": replace(LARGER, tied_embeddings=True)}
    return {name: write_checkpoint(root / name, args, endless=True) for name, args in cases.items()}


@pytest.fixture
def llama(checkpoints: dict[str, Path]) -> Llama:
    return Llama.build(checkpoints["untied"], **OPTIONS, dtype="float32")


def plain(directory: Path) -> Transformer:
    """The same model, as `load_model` makes it: it was never packed."""
    checkpoint = open_checkpoint(directory)
    sizes = replace(checkpoint.sizes, max_seq_len=64, max_batch_size=2)
    return load_model(checkpoint, sizes, initialize(device="cpu", dtype="float32")).eval()


def fast(model: Transformer) -> FastModel:
    assert isinstance(model.fast, FastModel)
    return model.fast


def wo(model: Transformer) -> nn.Module:
    return model.layers[1].attention.wo


def through_named_parameters(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("w2.weight"):
            parameter.data.mul_(2)


def through_modules(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.wv.weight.mul_(0.5)


def replaced(model: Transformer) -> None:
    wo(model).weight = nn.Parameter(2 * wo(model).weight)


def loaded(model: Transformer) -> None:
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})


def by_numpy(model: Transformer) -> None:
    wo(model).weight.detach().numpy()[3] = 1


def swapped(model: Transformer) -> None:
    wo(model).weight.data = wo(model).weight.data.flip(0)


def deleted(model: Transformer) -> None:
    del model.layers[1]


def wrapped(model: Transformer) -> None:
    class Twice(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    model.layers[0].attention.wk = Twice(model.layers[0].attention.wk)


class Halved(Transformer):
    def run(self, *rest: Any) -> Tensor:
        return super().run(*rest) / 2


EDITS: dict[str, Edit] = {
    "in place": lambda m: wo(m).weight.mul_(2),
    "data in place": lambda m: wo(m).weight.data.mul_(2),
    "one number": lambda m: wo(m).weight.data.__setitem__((3, 5), 7.0),
    "data swapped": swapped,
    "parameter replaced": replaced,
    "named_parameters": through_named_parameters,
    "modules": through_modules,
    "apply": lambda m: m.apply(lambda layer: layer.weight.data.mul_(1.25) if hasattr(layer, "weight") else None),
    "get_parameter": lambda m: m.get_parameter("layers.0.attention.wq.weight").mul_(0.5),
    "state_dict": lambda m: m.state_dict()["layers.0.feed_forward.w3.weight"].mul_(3),
    "load_state_dict": loaded,
    "numpy": by_numpy,
    "a norm": lambda m: m.layers[0].ffn_norm.weight.mul_(2),
    "a norm replaced": lambda m: setattr(m.norm, "weight", nn.Parameter(2 * m.norm.weight)),
    "a norm's columns": lambda m: setattr(
        m.norm.weight, "data", torch.stack([2 * m.norm.weight, m.norm.weight], 1)[:, 0]
    ),
    "a norm of one number": lambda m: setattr(m.norm, "weight", nn.Parameter(torch.tensor(2.0))),
    "output alone": lambda m: setattr(m.output, "weight", nn.Parameter(m.output.weight.flip(0))),
    "the embedding alone": lambda m: setattr(m.tok_embeddings, "weight", nn.Parameter(2 * m.tok_embeddings.weight)),
    "max_norm": lambda m: setattr(m.tok_embeddings, "max_norm", 0.1),
    "a dict of modules": lambda m: setattr(m.layers, "_modules", {"0": m.layers[0]}),
    "another class": lambda m: setattr(m, "__class__", Halved),
    "eps": lambda m: setattr(m.layers[0].ffn_norm, "eps", 3.0),
    "a bias": lambda m: m.layers[0].attention.wq.bias.add_(1),
    "output": lambda m: m.output.weight.mul_(2),
    "the embedding": lambda m: m.tok_embeddings.weight[1].mul_(2),
    "a layer deleted": deleted,
    "a layer replaced": lambda m: m.layers.__setitem__(1, m.layers[0]),
    "a module around": wrapped,
    "forward of an object": lambda m: setattr(m.layers[0].feed_forward, "forward", lambda x: 0.5 * x),
    "a cast there and back": lambda m: (m.bfloat16(), m.float()),
    "a hook": lambda m: m.layers[1].register_forward_hook(lambda layer, args, output: 2 * output),
    "a hook before": lambda m: m.layers[1].register_forward_pre_hook(lambda layer, args: (2 * args[0], *args[1:])),
}


@pytest.mark.parametrize("warm", [False, True], ids=["at once", "after an answer"])
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("case", ["untied", "tied"])
def test_an_edit_holds(checkpoints: dict[str, Path], case: str, name: str, warm: bool) -> None:
    """In a forward by hand of one token or several, and in what is generated."""
    llama, expected = Llama.build(checkpoints[case], **OPTIONS, dtype="float32"), plain(checkpoints[case])
    tokens = torch.tensor([PROMPTS[0]])
    before = expected(tokens).detach()
    if warm:
        llama.generate(PROMPTS, 12, temperature=0)
    with torch.no_grad():
        EDITS[name](llama.model), EDITS[name](expected)
    text = llama.generate(PROMPTS, 12, temperature=0)[0]
    assert text == Llama(expected, llama.tokenizer).generate(PROMPTS, 12, temperature=0)[0]
    for length, start in ((5, 0), (1, 5), (1, 6)):
        step = tokens[:, :length], start
        assert_close(llama.model(*step), expected(*step).detach())
    assert_close(llama.model(tokens).detach(), expected(tokens).detach())
    assert not torch.equal(expected(tokens), before), "the edit changes something"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_an_edit_packs_in_the_form_that_the_matrix_had(checkpoints: dict[str, Path], quantization: str) -> None:
    llama = Llama.build(checkpoints["untied"], **OPTIONS, dtype="float32", quantization=quantization)
    whole = [matrix.unpack() for matrix in fast(llama.model).packed_matrices]
    with torch.no_grad():
        wo(llama.model).weight.mul_(2)
    llama.generate(PROMPTS, 2, temperature=0)
    matrices = fast(llama.model).packed_matrices
    assert all(isinstance(matrix, QuantizedMatrix) for matrix in matrices)
    ratios = [float((new.unpack() / old).nanmedian()) for new, old in zip(matrices, whole, strict=True)]
    assert sorted(ratios) == [1.0] * (len(ratios) - 1) + [2.0]


def test_what_is_held_may_be_edited_later(llama: Llama) -> None:
    """A parameter, a tensor of a state dict, a layer: however many answers ago it was taken."""
    model = llama.model
    parameter, state, layer = wo(model).weight, model.state_dict(), model.layers[0].feed_forward
    texts = [llama.generate(PROMPTS, 12, temperature=0)[0] for _ in range(2)]
    parameter.data.mul_(-1)
    texts.append(llama.generate(PROMPTS, 12, temperature=0)[0])
    state["layers.0.attention.wv.weight"].mul_(-2)
    texts.append(llama.generate(PROMPTS, 12, temperature=0)[0])
    layer.w1.weight.data.mul_(-2)
    texts.append(llama.generate(PROMPTS, 12, temperature=0)[0])
    assert texts[0] == texts[1] and all(a != b for a, b in pairwise(texts[1:]))
    assert wo(model).weight is parameter


def hold_norm(model: Transformer) -> Callable[[], None]:
    weight = model.layers[0].ffn_norm.weight
    return lambda: setattr(weight, "data", -3 * weight.data)


def hold_storage(model: Transformer) -> Callable[[], None]:
    storage = model.layers[0].attention.wv.weight.untyped_storage()

    def edit() -> None:
        torch.empty(0).set_(storage, 0, (storage.nbytes() // 4,)).mul_(-2)

    return edit


def hold_hooks(model: Transformer) -> Callable[[], None]:
    hooks = model.layers[0].attention._forward_hooks
    return lambda: hooks.update({0: lambda layer, args, output: -9 * output})


@pytest.mark.parametrize("hold", [hold_norm, hold_storage, hold_hooks])
def test_what_is_held_of_a_layer_is_the_layers(
    llama: Llama, checkpoints: dict[str, Path], hold: Callable[[Transformer], Callable[[], None]]
) -> None:
    model = plain(checkpoints["untied"])
    edits = [hold(llama.model), hold(model)]
    before = [llama.generate(PROMPTS, 12, temperature=0) for _ in range(3)]
    for edit in edits:
        edit()
    after = llama.generate(PROMPTS, 12, temperature=0)
    assert after == Llama(model, llama.tokenizer).generate(PROMPTS, 12, temperature=0) != before[-1]


def test_hidden_states_and_logits_by_hand_have_the_edit(llama: Llama, checkpoints: dict[str, Path]) -> None:
    llama.generate(PROMPTS, 4, temperature=0)
    model, tokens = plain(checkpoints["untied"]), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        for one in (llama.model, model):
            one.layers[0].feed_forward.w2.weight.mul_(-3)
        h = model.hidden_states(tokens)
        assert_close(llama.model.hidden_states(tokens), h)
        for one in (llama.model, model):
            one.output.weight.mul_(-1)
        assert_close(llama.model.logits(h), model.logits(h))


def test_a_replaced_call_of_a_class_runs(llama: Llama, checkpoints: dict[str, Path]) -> None:
    before = llama.generate(PROMPTS, 6, temperature=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeedForward, "__call__", lambda self, x: 0 * x)
        text = llama.generate(PROMPTS, 6, temperature=0)
        assert (
            text == Llama(plain(checkpoints["untied"]), llama.tokenizer).generate(PROMPTS, 6, temperature=0) != before
        )
    assert llama.generate(PROMPTS, 6, temperature=0) == before


def test_a_matrix_that_was_away_is_packed_again(checkpoints: dict[str, Path]) -> None:
    llama = Llama.build(checkpoints["untied"], **OPTIONS, dtype="float32", quantization="int8")
    model, nbytes = llama.model, llama.model.fast.weight_bytes
    weight = wo(model).weight
    with torch.no_grad():
        tokens = torch.tensor([PROMPTS[0]])
        torch.func.functional_call(model, {"layers.1.attention.wo.weight": 2 * weight}, (tokens,))
    twice = nn.Parameter(2 * weight.detach())
    del wo(model).weight
    wo(model).weight = twice
    del weight, twice
    text = llama.generate(PROMPTS, 4, temperature=0)
    model.refresh()
    assert text == llama.generate(PROMPTS, 4, temperature=0)
    assert (fast(model).weight_bytes, fast(model).usable) == (nbytes, True)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_edit_by_a_logits_processor_holds(llama: Llama, checkpoints: dict[str, Path], num_beams: int) -> None:
    texts = []
    for model in (llama.model, plain(checkpoints["untied"])):
        calls: list[int] = []

        def process(tokens: Any, logits: Tensor, model: Transformer = model, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            if len(calls) == 3:
                model.layers[0].feed_forward.w2.weight.data.mul_(-30)
            return logits

        one = Llama(model, llama.tokenizer)
        texts.append(one.generate(PROMPTS[:1], 12, temperature=0, num_beams=num_beams, logits_processor=process))
    assert texts[0] == texts[1]


def test_an_answer_looks_for_edits_once(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much of the model the caller holds."""
    looks: list[int] = []
    compare = FastModel._compare
    monkeypatch.setattr(FastModel, "_compare", lambda self: looks.append(1) or compare(self))
    state = llama.model.state_dict()
    for num_beams in (1, 2):
        llama.generate(PROMPTS[:1], 12, temperature=0, num_beams=num_beams)
    assert state and len(looks) == 2


@pytest.mark.parametrize("name", ["in place", "numpy", "parameter replaced", "a norm", "a hook", "a module around"])
def test_an_edit_between_two_steps_of_a_stream_holds(checkpoints: dict[str, Path], name: str) -> None:
    """From the next step on; what was cached before stays."""
    models = [Llama.build(checkpoints["untied"], **OPTIONS, dtype="float32").model, plain(checkpoints["untied"])]
    tokenizer = Llama.build(checkpoints["untied"], **OPTIONS, dtype="float32").tokenizer
    texts = []
    for model in models:
        stream: Iterator = Llama(model, tokenizer).stream([PROMPTS[0]], 12, temperature=0)
        answer = [next(stream)[0].token for _ in range(4)]
        with torch.no_grad():
            EDITS[name](model)
        texts.append(answer + [steps[0].token for steps in stream])
    assert texts[0] == texts[1]


def read_shapes(model: Transformer) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def save(model: Transformer) -> None:
    torch.save(model.state_dict(), io.BytesIO())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reads", [read_shapes, save])
def test_reading_leaves_nothing_behind(checkpoints: dict[str, Path], reads: Edit, dtype: str) -> None:
    """Plain weights are dropped, and from the next call on nothing is compared any more."""
    model = Llama.build(checkpoints["untied"], **OPTIONS, dtype=dtype).model
    matrices = fast(model).packed_matrices
    reads(model)
    assert fast(model).watch.reached and fast(model).watch.handed_out
    model.refresh()
    assert not fast(model).watch.reached and not fast(model).watch.handed_out
    assert all(a is b for a, b in zip(fast(model).packed_matrices, matrices, strict=True)), "nothing is packed again"


def test_few_plain_weights_are_there_at_a_time(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody looks at one after the other, of which none is the file's memory."""
    monkeypatch.setattr("llama.accelerate.plain_weights.MOST_UNPACKED", 1)
    model = copy.deepcopy(llama.model)
    model.refresh()
    seen = 0
    for layer in model.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            seen += layer.weight.numel()
            assert len(fast(model).watch.handed_out) <= 2
    assert seen > 0


def test_a_weight_is_the_files_own_memory(llama: Llama, checkpoints: dict[str, Path]) -> None:
    """And what is written there stays this model's alone."""
    weight = wo(llama.model).weight
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "consolidated" in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    assert any(first <= weight.data_ptr() < end for first, end in ranges)
    with torch.no_grad():
        weight.zero_()
    llama.generate(PROMPTS, 2)
    stored = torch.load(checkpoints["untied"] / "consolidated.00.pth")["layers.1.attention.wo.weight"]
    assert float(stored.abs().max()) > 0


def test_what_hangs_on_a_parameter_stays(llama: Llama) -> None:
    model = llama.model
    model.layers[0].requires_grad_(False)
    model(torch.tensor([PROMPTS[0]])).sum().backward()
    gradient = wo(model).weight.grad
    assert gradient is not None and float(gradient.abs().max()) > 0
    for _ in range(2):
        llama.generate(PROMPTS, 2)
        assert wo(model).weight.grad is gradient
    model.zero_grad()
    llama.generate(PROMPTS, 2)
    assert not any(parameter.requires_grad for parameter in model.layers[0].parameters())
    assert all(parameter.requires_grad for parameter in model.layers[1].parameters())


def test_a_replaced_forward_of_a_class_runs(llama: Llama, checkpoints: dict[str, Path]) -> None:
    """As long as it is there, with every argument that it has, in every step."""
    before, seen = llama.generate(PROMPTS, 6, temperature=0), []
    forward = TransformerBlock.forward

    def watching(self: TransformerBlock, x: Tensor, *rest: object) -> Tensor:
        seen.append(x.shape[1])
        return 2 * forward(self, x, *rest)

    for cls, replacement in ((TransformerBlock, watching), (FeedForward, lambda self, x: 0 * x)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, "forward", replacement)
            text = llama.generate(PROMPTS, 6, temperature=0)
            expected = Llama(plain(checkpoints["untied"]), llama.tokenizer).generate(PROMPTS, 6, temperature=0)
            assert text == expected != before
        assert llama.generate(PROMPTS, 6, temperature=0) == before
    assert seen.count(1) == 2 * 2 * 5, "each of 2 layers in 5 steps, in both models"


def test_a_copy_is_edited_alone(llama: Llama) -> None:
    before = llama.generate(PROMPTS, 12, temperature=0)
    for _ in range(2):
        twin = Llama(copy.deepcopy(llama.model), llama.tokenizer)
        assert twin.generate(PROMPTS, 12, temperature=0) == before
        assert all(isinstance(matrix, FloatMatrix) for matrix in fast(twin.model).packed_matrices)
        with torch.no_grad():
            wo(twin.model).weight.mul_(-2)
            wo(twin.model).register_forward_hook(lambda *_: None)
        assert twin.generate(PROMPTS, 12, temperature=0) != before
        assert llama.generate(PROMPTS, 12, temperature=0) == before


@pytest.mark.parametrize("name", ["a module around", "a norm of one number", "a hook", "a layer deleted"])
def test_a_copy_may_be_edited_before_its_first_use(llama: Llama, checkpoints: dict[str, Path], name: str) -> None:
    twin, expected = copy.deepcopy(llama.model), plain(checkpoints["untied"])
    with torch.no_grad():
        EDITS[name](twin), EDITS[name](expected)
    texts = [Llama(m, llama.tokenizer).generate(PROMPTS, 12, temperature=0) for m in (twin, expected)]
    assert texts[0] == texts[1]
    tokens = torch.tensor([PROMPTS[0]])
    assert_close(twin(tokens).detach(), expected(tokens).detach())
    assert not torch.equal(twin(tokens), llama.model(tokens))


def test_a_saved_model_is_a_plain_one(llama: Llama) -> None:
    file, tokens = io.BytesIO(), torch.tensor([PROMPTS[0]])
    torch.save(llama.model, file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    assert type(model) is Transformer and model.fast is None
    assert_close(model(tokens).detach(), llama.model(tokens).detach())
