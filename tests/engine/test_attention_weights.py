"""Attention weights and hidden states against transformers': whole, through the cache, of plain and of fast models."""

import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from rank_pool import RankPool
from scoring_program import compute
from tiny import ARGS, write_checkpoint, write_tokenizer
from tiny_families import WINDOW, make_model, rope
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llama import Llama, LlamaError
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.engine.attention_weights import attention_weights
from llama.model import Transformer
from llama.parallel import Place

KINDS = {  # heads of 16 numbers, for which the fast form has a kernel, and of 12, for which it has none
    "grouped": ("llama", {"num_key_value_heads": 2}),
    "every head its own": ("llama", {"num_key_value_heads": 8, "head_dim": 12}),
    "one for all": ("llama", {"num_key_value_heads": 1, **rope("yarn", factor=4.0, attention_factor=1.7)}),
    "window": ("mistral", {"sliding_window": 4}),
    "window in one layer": ("qwen2", WINDOW),
    "norms": ("qwen3", {"head_dim": 24}),
}
LENGTH = 11
SIZES = {"max_seq_len": 16, "max_batch_size": 3}


@dataclass(frozen=True)
class Pair:
    theirs: PreTrainedModel
    ours: Transformer
    tokens: Tensor  # (3, LENGTH)
    expected: CausalLMOutputWithPast


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, place: Place) -> "type[Pair]":
    """Pair(kind, form): what was made is kept."""

    @cache
    def theirs(kind: str) -> tuple[PreTrainedModel, Path]:
        family, config = KINDS[kind]
        model, directory = make_model(family, {"vocab_size": 512, **config}, 3), tmp_path_factory.mktemp("kind")
        model.save_pretrained(directory)
        write_tokenizer(directory / "tokenizer.model")
        return model, directory

    @cache
    def pair(kind: str, form: str) -> Pair:
        model, directory = theirs(kind)
        if form != "plain":
            ours = Llama.build(directory, device="cpu", dtype="float32", compile=form == "compiled", **SIZES).model
        else:
            checkpoint = open_checkpoint(directory)
            ours = load_model(checkpoint, replace(checkpoint.sizes, **SIZES), place)
        tokens = torch.randint(512, (3, LENGTH), generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            expected = model(input_ids=tokens, use_cache=False, output_attentions=True, output_hidden_states=True)
        return Pair(model, ours, tokens, expected)

    return pair  # type: ignore[return-value]


@pytest.fixture(params=["plain", "fast"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, form: str, made: "type[Pair]") -> Pair:
    return made(request.param, form)


def assert_all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5)


# --- attention weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_pos", [None, 0])
def test_weights_are_transformers(pair: Pair, start_pos: int | None) -> None:
    logits, weights = attention_weights(pair.ours, pair.tokens, start_pos)
    assert_all_close(weights, pair.expected.attentions)
    assert_close(logits, pair.expected.logits, 1e-5)
    assert_close(logits, pair.ours(pair.tokens, start_pos).detach(), 1e-5)
    assert all((layer.sum(-1) - 1).abs().max() < 1e-6 for layer in weights)
    assert all((layer >= 0).all() for layer in weights)


def test_weights_through_the_cache(pair: Pair) -> None:
    """Each of both paths looks at what the other cached, turn by turn: of several tokens, and of one."""
    step = {True: lambda *at: attention_weights(pair.ours, *at), False: lambda *at: (pair.ours(*at), ())}
    for first in (True, False):
        eager = first
        for start, end in ((0, 4), (4, 7), (7, 8), (8, 9), (9, 11)):
            logits, weights = step[eager](pair.tokens[:, start:end], start)
            assert_close(logits, pair.expected.logits[:, start:end], 2e-5)
            if eager:
                assert_all_close(weights, tuple(w[:, :, start:end, :end] for w in pair.expected.attentions))
            eager = not eager


def test_rows_at_positions_of_their_own(pair: Pair) -> None:
    lengths = torch.tensor([3, 8, 5])
    pair.ours(pair.tokens[:, :8], 0)  # padded to the longest
    columns = lengths[:, None] + torch.arange(2)
    logits, weights = attention_weights(pair.ours, pair.tokens.gather(1, columns), lengths)
    rows = torch.arange(3)[:, None]
    assert_close(logits, pair.expected.logits[rows, columns], 2e-5)
    expected = tuple(w.transpose(1, 2)[rows, columns].transpose(1, 2)[..., :10] for w in pair.expected.attentions)
    assert_all_close(weights, expected)
    for layer in weights:
        for row, length in enumerate(lengths.tolist()):
            assert layer[row, :, 0, length + 1 :].eq(0).all(), "nothing of another row's, or of what was padded"


def test_the_model_stays_as_it_is(pair: Pair) -> None:
    def described() -> list[object]:
        kinds = [type(module) for module in pair.ours.modules()]
        tensors = [id(tensor) for tensor in (*pair.ours.parameters(), *pair.ours.buffers())]
        return [*kinds, *tensors, *pair.ours.state_dict(), id(vars(pair.ours).get("run"))]

    pair.ours(pair.tokens, 0)  # which makes the caches
    before = described()
    attention_weights(pair.ours, pair.tokens, 0)
    for room in (SIZES["max_seq_len"], -1):
        with pytest.raises(LlamaError, match="do not fit the KV cache"):
            attention_weights(pair.ours, pair.tokens, room)
    assert described() == before


def test_weights_make_the_caches_too(pair: Pair) -> None:
    """In a model that was never asked, for the model that follows."""
    ours = copy.deepcopy(pair.ours)
    for layer in ours.layers:
        layer.attention.cache_k = layer.attention.cache_v = None
    attention_weights(ours, pair.tokens[:, :6], 0)
    assert_close(ours(pair.tokens[:, 6:], 6), pair.expected.logits[:, 6:], 2e-5)


def test_hooks_see_the_layers(pair: Pair) -> None:
    seen = []
    hook = pair.ours.layers[1].attention.register_forward_hook(lambda _, __, output: seen.append(output))
    attention_weights(pair.ours, pair.tokens)
    hook.remove()
    assert len(seen) == 1


def test_gradients_flow_through_weights_and_logits(made: "type[Pair]") -> None:
    pair = made("grouped", "plain")
    theirs = copy.deepcopy(pair.theirs)
    found = theirs(input_ids=pair.tokens, use_cache=False, output_attentions=True)
    (found.logits.logsumexp(-1).sum() + found.attentions[1].pow(2).sum()).backward()
    logits, weights = attention_weights(pair.ours, pair.tokens)
    loss = logits.logsumexp(-1).sum() + weights[1].pow(2).sum()
    (gradient,) = torch.autograd.grad(loss, [pair.ours.tok_embeddings.weight])
    assert_close(gradient, theirs.get_input_embeddings().weight.grad)
    assert not attention_weights(pair.ours, pair.tokens, 0)[1][0].requires_grad


def test_half_precision(made: "type[Pair]") -> None:
    """Weights are float32 in any dtype, and close to those of float32."""
    pair = made("grouped", "plain")
    logits, weights = attention_weights(copy.deepcopy(pair.ours).bfloat16(), pair.tokens)
    assert logits.dtype == torch.float32
    for found, expected in zip(weights, pair.expected.attentions, strict=True):
        assert_close(found, expected, 0.2)
        assert (found.sum(-1) - 1).abs().max() < 1e-5


# --- hidden states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_pos", [None, 0])
def test_hidden_states_are_transformers(pair: Pair, start_pos: int | None) -> None:
    logits, hidden = pair.ours(pair.tokens, start_pos, return_hidden=True)
    assert len(hidden) == pair.ours.n_layers + 1
    assert_all_close(hidden, pair.expected.hidden_states)
    assert torch.equal(logits, pair.ours(pair.tokens, start_pos))
    assert hidden[0].requires_grad == logits.requires_grad == (start_pos is None)


def test_hidden_states_of_steps(pair: Pair) -> None:
    """One token a row, after such steps were recorded: at one position, and at positions of the rows' own."""
    for _ in range(2):
        for at in range(LENGTH):
            plain = pair.ours(pair.tokens[:, at : at + 1], at)
            logits, hidden = pair.ours(pair.tokens[:, at : at + 1], at, return_hidden=True)
            assert_close(logits, plain, 1e-5)
            assert_all_close(hidden, tuple(h[:, at : at + 1] for h in pair.expected.hidden_states))
    own = torch.tensor([3, 8, 5])
    rows = torch.arange(3)
    _, hidden = pair.ours(pair.tokens[rows, own][:, None], own, return_hidden=True)
    assert_all_close(hidden, tuple(h[rows, own][:, None] for h in pair.expected.hidden_states))


@pytest.mark.slow
def test_compiled_layers_are_no_obstacle(made: "type[Pair]") -> None:
    """Those of heads that no kernel has: torch has compiled each layer's step."""
    pair = made("every head its own", "compiled")
    pair.ours(pair.tokens[:, :8], 0)
    step, at = pair.tokens[:, 8:9], slice(8, 9)
    for _ in range(2):
        logits, hidden = pair.ours(step, 8, return_hidden=True)
        assert_all_close(hidden, tuple(h[:, at] for h in pair.expected.hidden_states))
        assert_close(logits, pair.ours(step, 8), 1e-5)
        assert_all_close(
            attention_weights(pair.ours, step, 8)[1], tuple(w[:, :, at, :9] for w in pair.expected.attentions)
        )


def test_gradients_flow_through_hidden_states(made: "type[Pair]") -> None:
    pair = made("window in one layer", "plain")
    theirs = copy.deepcopy(pair.theirs)
    found = theirs(input_ids=pair.tokens, use_cache=False, output_hidden_states=True).hidden_states
    sum(h.pow(3).sum() for h in found).backward()
    _, hidden = pair.ours(pair.tokens, return_hidden=True)
    (gradient,) = torch.autograd.grad(sum(h.pow(3).sum() for h in hidden), [pair.ours.tok_embeddings.weight])
    assert_close(gradient, theirs.get_input_embeddings().weight.grad)


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_two_ranks_have_all_heads(pool: RankPool, tmp_path: Path, kv_heads: int) -> None:
    """On both, also where both hold the same key head; and the same hidden states and gradients."""
    directory = write_checkpoint(tmp_path / "ckpt", replace(ARGS, n_heads=4, n_kv_heads=kv_heads))
    one, *two = (result for ranks in (0, 2) for result in pool.run(compute, str(directory), ranks=ranks).results)
    for found in two:
        for name in ("attention", "hidden"):
            for (logits, layers), (expected, of_layers) in zip(found[name], one[name], strict=True):
                assert_close(logits, expected.detach(), 1e-5)
                assert_all_close(layers, tuple(layer.detach() for layer in of_layers))
        assert found["attention"][0][1][0].shape == (2, 4, 7, 7)
        assert_close(found["gradient"], one["gradient"], 1e-4)
