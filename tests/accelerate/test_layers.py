"""The fast form of a model against the plain one: the same texts, logits, gradients and state, in less memory.

On processors, or with compilers, that make no kernels both are the same form. test_families.py compares both with
transformers, on one rank and on more; test_kernels.py has each kernel by itself.
"""

import copy
import operator
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import assert_close, next_token_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARGS, PROMPTS, ROOT, write_checkpoint
from torch import Tensor

from llama import Llama, LlamaError
from llama.accelerate import quantization
from llama.accelerate.accelerator import Acceleration, Accelerator
from llama.accelerate.fast_model import FastModel
from llama.accelerate.kernels import cpu
from llama.accelerate.quantization import FloatMatrix
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.checkpoints.meta import save_checkpoint
from llama.checkpoints.side_files import find_tokenizer
from llama.model import Transformer
from llama.parallel import initialize
from llama.tokenization.hf_tokenizer import open_tokenizer

few = settings(deadline=None, max_examples=10)
SIZES = {"max_seq_len": 64, "max_batch_size": 4}
LARGER = replace(ARGS, n_heads=4, n_kv_heads=2, multiple_of=8)  # heads that the kernel has, blocks that are not full
CASES = {
    "small heads": ARGS,
    "larger heads": LARGER,
    "tied": replace(LARGER, tied_embeddings=True),
    "all at once": replace(
        LARGER,
        head_dim=48,
        qkv_bias=True,
        wo_bias=True,
        mlp_bias=True,
        qk_norm=True,
        sliding_window=5,
        sliding_layers=(1,),
    ),
}
DEMO_PROMPTS = [
    "Once upon a time",
    "The cat",
    "1 2 3 4 5",
    "What is the capital of France?",
    "She opened the door and",
    "é漢字🙂",
    "a",
    "In the morning the two friends went down to the river, where they",
]
compiled = pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints, each number of which matters: norms and biases are random too."""
    root, random = tmp_path_factory.mktemp("inference"), torch.Generator().manual_seed(1)
    found = {"demo": ROOT / "demo" / "model"}
    for name, args in CASES.items():
        found[name] = write_checkpoint(root / name.replace(" ", "-"), args)
        tensors = torch.load(found[name] / "consolidated.00.pth")
        for tensor in tensors.values():
            if tensor.ndim == 1:
                tensor += 0.3 * torch.randn(tensor.shape, generator=random)
        save_checkpoint(found[name], args, tensors)
    return found


@pytest.fixture(scope="module")
def built(directories: dict[str, Path]) -> "type[Pair]":
    """Pair(name, dtype): what was built is kept."""

    @cache
    def pair(name: str, dtype: str = "float32") -> Pair:
        return Pair(directories[name], dtype)

    return pair  # type: ignore[return-value]


class Pair:
    """One checkpoint in both forms."""

    def __init__(self, directory: Path, dtype: str):
        self.fast = Llama.build(directory, device="cpu", dtype=dtype, **SIZES)
        self.plain = plain(directory, dtype)

    def tokens(self, *shape: int, seed: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randint(self.plain.model.vocab_size, shape, generator=random)

    def __iter__(self) -> Iterator[Llama]:
        return iter((self.fast, self.plain))


def plain(directory: Path, dtype: str) -> Llama:
    """What `Llama.build` gives where there are no kernels."""
    checkpoint = open_checkpoint(directory)
    model = load_model(checkpoint, replace(checkpoint.sizes, **SIZES), initialize(device="cpu", dtype=dtype))
    return Llama(model, open_tokenizer(find_tokenizer(checkpoint)))


def copied(llama: Llama) -> Transformer:
    return copy.deepcopy(llama.model)


def packed_matrices(model: Transformer) -> list[FloatMatrix]:
    """Those that decode by kernels; none where the model has no fast form, or runs its plain text."""
    model.refresh()
    fast = model.fast if isinstance(model.fast, FastModel) and model.fast.usable else None
    return [] if fast is None else [matrix for matrix in fast.packed_matrices if isinstance(matrix, FloatMatrix)]


@compiled
@pytest.mark.parametrize("name", CASES)
def test_what_is_fast(built: "type[Pair]", name: str) -> None:
    """All matrices, once each; but neither the embedding, of which rows are read, nor small heads' attention."""
    args, model = CASES[name], built(name).fast.model
    packed, network = packed_matrices(model), model.fast.network
    assert len(packed) == 7 * args.n_layers + 1
    assert sum(matrix.rows for matrix in packed) == sum(
        len(tensor) for key, tensor in model.state_dict().items() if tensor.ndim == 2 and key != "tok_embeddings.weight"
    )
    norms = [norm for block in network.blocks for norm in (block.attention_norm, block.ffn_norm)]
    assert network.kernels and all(norm.kernels for norm in [*norms, network.norm])
    assert network.attends == (args.head_size % cpu.LANES == 0)
    assert packed_matrices(built(name).plain.model) == []


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@few
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 10**6))
def test_greedy_texts_are_the_same(built: "type[Pair]", name: str, lengths: list[int], seed: int) -> None:
    """Ragged prompts, each until max_seq_len is full or a stop token comes: rows end at different times."""
    pair = built(name)
    prompts = [row[:length].tolist() for row, length in zip(pair.tokens(4, 40, seed=seed), lengths, strict=False)]
    fast, slow = (llama.generate(prompts, None, temperature=0, logprobs=True) for llama in pair)
    assert fast[0] == slow[0]
    for a, b in zip(fast[1], slow[1], strict=True):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-3)


def test_greedy_texts_of_the_demo_are_the_same(built: "type[Pair]") -> None:
    pair = built("demo")
    for batch in (DEMO_PROMPTS[:4], DEMO_PROMPTS[4:], DEMO_PROMPTS[5:6], PROMPTS):
        fast, slow = (llama.text_completion(batch, temperature=0) for llama in pair)
        assert fast == slow
    dialogs = [[{"role": "user", "content": prompt}] for prompt in DEMO_PROMPTS[:4]]
    fast, slow = (llama.chat_completion(dialogs, temperature=0) for llama in pair)
    assert fast == slow
    fast, slow = (llama.text_completion(DEMO_PROMPTS[:4], temperature=0.8, max_gen_len=20) for llama in pair)
    assert fast == slow, "and so are samples of the same chance"


@pytest.mark.parametrize("name", [*CASES, "demo"])
def test_bfloat16_differs_where_two_words_are_nearly_as_likely(built: "type[Pair]", name: str) -> None:
    """Where greedy texts part, the plain logits of both words are as near as roundings may bring about.

    Let p and f be the plain and the fast form's largest errors beside float32. A word that the fast form prefers to the
    plain one's is behind it by at most 2 p + 2 f in the plain logits; and f is at most 2 p: it rounds in fewer places.
    """
    pair, exact = built(name, "bfloat16"), copied(built(name, "bfloat16").plain).float()
    prompts = [row[: 3 + 7 * i].tolist() for i, row in enumerate(pair.tokens(4, 24, seed=5))]
    if name == "demo":
        prompts = [pair.plain.tokenizer.encode(prompt, bos=True, eos=False) for prompt in DEMO_PROMPTS[:4]]
    fast, slow = (llama.generate(prompts, 30, temperature=0)[0] for llama in pair)
    errors = {"fast": [], "plain": []}
    for prompt, a, b in zip(prompts, fast, slow, strict=True):
        text = torch.tensor([prompt + b])
        with torch.no_grad():
            right, logits = exact(text)[0], {"fast": decoded(pair.fast, text), "plain": decoded(pair.plain, text)}
        for form, found in logits.items():
            errors[form].append((found - right).abs())
        largest = float(errors["plain"][-1].max())
        assert float(errors["fast"][-1].max()) <= 2 * largest
        parted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if parted is not None:
            at = logits["plain"][len(prompt) + parted - 1]
            assert float((at[b[parted]] - at[a[parted]]).abs()) <= 6 * largest
    fast_mean, plain_mean = (torch.cat(errors[form]).mean() for form in ("fast", "plain"))
    assert 0 < float(fast_mean) <= 1.2 * float(plain_mean)


def decoded(llama: Llama, text: Tensor) -> Tensor:
    """Logits of one row, token by token: (T, vocab_size)."""
    return torch.cat([llama.model(text[:, i : i + 1], i)[0] for i in range(text.shape[1])])


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, "demo"])
@few
@given(st.data())
def test_logits_through_the_cache(built: "type[Pair]", name: str, data: st.DataObject) -> None:
    """Ragged prompts, then chunks of one token or more at positions that are an int, or integers of any width."""
    pair = built(name)
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4), label="prompts")
    chunks = data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 5]), max_size=8), label="chunks")
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]), label="positions")
    mode = data.draw(st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]), label="mode")
    positions = torch.tensor(lengths)
    tokens = pair.tokens(len(lengths), max(lengths) + sum(chunks), seed=sum(lengths))
    fast, slow = (llama.model(tokens[:, : max(lengths)], 0) for llama in pair)
    assert_close(fast, slow)
    for i, length in enumerate(chunks):
        step = tokens[:, max(lengths) + i :][:, :length]
        where = int(positions[0]) if len(lengths) == 1 and i % 2 else positions.to(dtype)
        with mode():
            fast, slow = (llama.model(step, where) for llama in pair)
        assert_close(fast, slow)
        positions = positions + length


@pytest.mark.parametrize("name", [*CASES, "demo"])
def test_logits_without_a_cache(built: "type[Pair]", name: str) -> None:
    pair = built(name)
    for shape in ((1, 1), (3, 9), (2, 80)):
        tokens = pair.tokens(*shape)
        fast, slow = (llama.model(tokens) for llama in pair)
        assert_close(fast, slow.detach())
        with torch.no_grad():
            assert_close(pair.fast.model(tokens.int()), slow.detach())


@pytest.mark.parametrize("name", CASES)
def test_tokens_outside_the_vocabulary(built: "type[Pair]", name: str) -> None:
    """Pads of -1, and what lies past the end: as nothing, in both forms."""
    pair = built(name)
    for odd in (-1, -70, pair.plain.model.vocab_size, pair.plain.model.vocab_size + 100):
        tokens = pair.tokens(2, 6)
        tokens[0, 2] = odd
        with torch.no_grad():
            assert_close(*(llama.model(tokens) for llama in pair))


def test_any_thread_may_ask(built: "type[Pair]") -> None:
    pair, found = built("larger heads"), []
    tokens, threads = pair.tokens(3, 9), torch.get_num_threads()

    def ask(count: int) -> None:
        torch.set_num_threads(count)
        with torch.no_grad():
            found.append(pair.fast.model(tokens))

    running = [threading.Thread(target=ask, args=(count,)) for count in (1, 2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    try:
        ask(2)
    finally:
        torch.set_num_threads(threads)
    for logits in found:
        assert torch.equal(logits, found[0])
        assert_close(logits, pair.plain.model(tokens).detach())


@pytest.mark.parametrize("name", ["layers.1.attention.wk.weight", "layers.0.feed_forward.w1.weight", "norm.weight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_damaged_weights_are_told(directories: dict[str, Path], tmp_path: Path, name: str, dtype: str) -> None:
    """One NaN reaches the logits of a step, whatever it meets on its way. (Not always in torch's attention.)"""
    tensors = torch.load(directories["larger heads"] / "consolidated.00.pth")
    tensors[name].view(-1)[5] = torch.nan
    save_checkpoint(tmp_path, LARGER, tensors)
    (tmp_path / "tokenizer.model").write_bytes((directories["larger heads"] / "tokenizer.model").read_bytes())
    llama = Llama.build(tmp_path, device="cpu", dtype=dtype)
    with pytest.raises(LlamaError, match="not finite"):
        llama.generate([[1, 2, 3]], 4, temperature=0)
    assert not llama.model(torch.tensor([[7]]), 2).isfinite().any()


# --- a module like any other -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*CASES, "demo"])
def test_the_state_is_the_same(built: "type[Pair]", name: str, dtype: str) -> None:
    fast, slow = (llama.model.state_dict() for llama in built(name, dtype))
    assert fast.keys() == slow.keys()
    for key, tensor in slow.items():
        assert fast[key].dtype == tensor.dtype and torch.equal(fast[key], tensor), key
    wanted = built(name, dtype).plain.model.layers[0].attention.wq.weight
    assert torch.equal(built(name, dtype).fast.model.layers[0].attention.wq.weight, wanted)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_a_state_may_be_loaded(built: "type[Pair]", name: str, training: bool) -> None:
    """Into either form, from either, as long as keys and shapes are right."""
    pair = built(name)
    changed, tokens = {key: tensor * 1.5 for key, tensor in pair.plain.model.state_dict().items()}, pair.tokens(2, 7)
    fast, slow = map(copied, pair)
    for model in (fast, slow):
        model.train(training)
        model.load_state_dict(changed, strict=True)
    assert_close(fast(tokens), slow(tokens).detach())
    assert all(torch.equal(tensor, changed[key]) for key, tensor in fast.state_dict().items())
    with pytest.raises(RuntimeError, match=r"output\.weight"):
        fast.load_state_dict({**changed, "output.weight": torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match="Missing"):
        fast.load_state_dict({})


@pytest.mark.parametrize("name", CASES)
def test_training_gives_the_same_gradients(built: "type[Pair]", name: str) -> None:
    """And the weights after a step are those that answer, packed again or not."""
    pair = built(name)
    fast, slow = (copied(llama).train() for llama in pair)
    tokens = pair.tokens(2, 9)
    for model in (fast, slow):
        next_token_loss(model(tokens), tokens).backward()
    found, expected = (dict(model.named_parameters(remove_duplicate=False)) for model in (fast, slow))
    assert found.keys() <= expected.keys() and len({*map(id, found.values())}) == len({*map(id, expected.values())})
    for key, weight in found.items():
        gradient = expected[key].grad
        assert float(gradient.norm()) > 0
        assert float((weight.grad - gradient).norm()) <= 1e-4 * float(gradient.norm()), key
    for model in (fast, slow):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert_close(fast(tokens), slow(tokens))
        before = slow(tokens)
        assert_close(fast.eval()(tokens), before)
        assert_close(fast(tokens[:, :1], 0), slow(tokens[:, :1], 0))
    assert len(packed_matrices(fast)) == len(packed_matrices(pair.fast.model))
    assert float((before - pair.plain.model(tokens).detach()).abs().max()) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_gradients_flow_through_packed_matrices(built: "type[Pair]", name: str) -> None:
    """To norms and biases, as in the plain form; a graph may be kept, and gradients add up."""
    pair = built(name)
    fast, slow = map(copied, pair)
    tokens = pair.tokens(2, 9)
    for model in (fast, slow):
        loss = next_token_loss(model(tokens), tokens)
        loss.backward(retain_graph=True)
        loss.backward()
    expected = dict(slow.named_parameters())
    shared = {key: weight for key, weight in fast.named_parameters() if key in expected}
    assert {key for key in expected if not key.endswith("weight") or "norm" in key} <= shared.keys()
    for key, weight in shared.items():
        assert float((weight.grad - expected[key].grad).norm()) <= 1e-4 * float(expected[key].grad.norm()), key


@pytest.mark.parametrize("name", ["larger heads", "tied"])
def test_who_remembers_the_mode_brings_it_back(built: "type[Pair]", name: str) -> None:
    """What many a program does around an evaluation unpacks nothing of a model that was never trained."""
    model = copied(built(name).fast)
    before, was = packed_matrices(model), model.training
    model.eval()
    model.train(was)
    assert all(map(operator.is_, packed_matrices(model), before)) and len(packed_matrices(model)) == len(before)


@pytest.mark.parametrize("name", ["larger heads", "tied"])
def test_copies_are_models_of_their_own(built: "type[Pair]", name: str) -> None:
    pair = built(name)
    tokens, copies = pair.tokens(1, 5), copied(pair.fast)
    before = pair.fast.model(tokens, 0)
    assert torch.equal(copies(tokens, 0), before)
    with torch.no_grad():
        copies.train()
        copies.output.weight.mul_(2)
        copies.eval()
        assert not torch.equal(copies(tokens, 0), before)
    assert torch.equal(pair.fast.model(tokens, 0), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["larger heads", "tied"])
def test_a_model_may_be_cast(built: "type[Pair]", name: str, dtype: torch.dtype) -> None:
    """Packed matrices have the shape that their dtype asks for, and not every dtype has kernels."""
    pair = built(name)
    tokens = pair.tokens(2, 6)
    with torch.no_grad():
        fast, slow = (copied(llama).to(dtype)(tokens).float() for llama in pair)
    assert_close(fast, slow, 1e-4 if dtype == torch.float64 else 0.05)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_matrices_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    weight = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = FloatMatrix(weight)
    for size in (1, 6000, 10**6):
        monkeypatch.setattr(quantization, "SLAB", size)
        pieces = FloatMatrix(weight)
        assert torch.equal(pieces.unpack(), weight) and torch.equal(pieces.packed, whole.packed)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["larger heads", "tied", "demo"])
def test_files_that_were_let_go_of_read_the_same_again(directories: dict[str, Path], name: str, dtype: str) -> None:
    """Others may hold tensors of the same file, or build from them again."""
    checkpoint = open_checkpoint(directories[name])
    before = {key: stored.read().clone() for key, stored in checkpoint.tensors.items()}
    place, states = initialize(device="cpu", dtype=dtype), []
    for _ in range(2):
        accelerator = Accelerator()
        model = load_model(checkpoint, replace(checkpoint.sizes, **SIZES), place, accelerator.pack_weight)
        accelerator.finish(model)
        states.append(model.state_dict())
        assert all(torch.equal(stored.read(), before[key]) for key, stored in checkpoint.tensors.items())
    for key, tensor in before.items():
        for state in states:
            assert torch.equal(state[key], tensor.to(place.dtype)), key


def test_without_kernels_the_plain_form_is_built(
    directories: dict[str, Path], built: "type[Pair]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    llama = Llama.build(directories["tied"], device="cpu", dtype="float32", **SIZES)
    assert packed_matrices(llama.model) == []
    prompts = built("tied").tokens(3, 9).tolist()
    assert llama.generate(prompts, 20, temperature=0) == built("tied").plain.generate(prompts, 20, temperature=0)


def test_models_of_other_dtypes_stay_plain(directories: dict[str, Path]) -> None:
    llama = Llama.build(directories["tied"], device="cpu", dtype="float16", **SIZES)
    assert packed_matrices(llama.model) == []
    llama.generate([[1, 2, 3]], 4, temperature=0)


def test_forms_that_are_not_known_are_refused() -> None:
    with pytest.raises(LlamaError, match="int3"):
        Acceleration("int3")  # type: ignore[arg-type]
