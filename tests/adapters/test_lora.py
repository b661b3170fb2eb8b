"""Low-rank adapters in memory against the peft library, alone and on several ranks."""

import copy
from pathlib import Path
from typing import Any

import lora_program
import pytest
import tiny_adapters
import torch
from conftest import Twin, assert_close, next_token_loss
from rank_pool import RankPool
from tiny_adapters import (
    ARGS,
    CONFIG,
    NAMES,
    TENSORS,
    adapted,
    hf_key,
    in_our_order,
    logits_of,
    randomized,
    save,
    wrapped,
)

from llama import LlamaError, ModelArgs, Transformer
from llama.accelerate.accelerator import Accelerator
from llama.adapters.lora import TARGETS, Lora, add_lora, lora_parameters, merge_lora
from llama.adapters.peft import load_adapter, save_adapter
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.checkpoints.meta import save_checkpoint
from llama.parallel import Place

twin, model, peft = tiny_adapters.twin, tiny_adapters.model, tiny_adapters.peft
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what peft asks of models

# --- in memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), TARGETS], ids=" ".join)
def test_outputs_and_gradients_are_pefts(twin: Twin, peft: Any, tmp_path: Path, targets: tuple[str, ...]) -> None:
    theirs, ours, tokens = (
        wrapped(peft, twin, *(NAMES[t] for t in targets)),
        copy.deepcopy(twin.ours),
        twin.tokens(2, 9),
    )
    load_adapter(ours, save(theirs, tmp_path))
    logits, expected = ours(tokens), theirs(input_ids=tokens, use_cache=False).logits
    assert_close(logits, expected.detach(), 1e-5)
    with pytest.raises(AssertionError):
        assert_close(twin.expected(tokens), expected.detach(), 0.1)
    next_token_loss(logits, tokens).backward()
    next_token_loss(expected, tokens).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in lora_parameters(ours).items():
        assert_close(parameter.grad, in_our_order(name, gradients.pop(hf_key(name, ".default"))))
    assert gradients == {}
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)


def test_a_fresh_adapter_changes_nothing(model: Transformer, twin: Twin) -> None:
    names = [name for name, _ in model.named_parameters()]
    add_lora(model, Lora(targets=TARGETS), seed=1)
    tokens = twin.tokens(2, 9)
    assert torch.equal(logits_of(model, tokens), logits_of(twin.ours, tokens))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, _ in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    assert trained == list(lora_parameters(model)) and len(trained) == 2 * (7 * ARGS.n_layers + 1)
    assert [name for name, _ in model.named_parameters() if name not in trained] == names


def test_what_is_drawn(twin: Twin) -> None:
    """A is drawn from the seed as nn.Linear's weights are; B is zero."""
    drawn = []
    for seed in (1, 1, -2):
        model = copy.deepcopy(twin.ours)
        add_lora(model, Lora(64, targets=("w2", "wk")), seed)
        drawn.append({name: p.detach() for name, p in lora_parameters(model).items()})
    for name, tensor in drawn[0].items():
        assert torch.equal(tensor, drawn[1][name])
        if name.endswith("lora_B"):
            assert not tensor.any()
            continue
        assert not torch.equal(tensor, drawn[2][name])
        bound = tensor.shape[1] ** -0.5
        assert 0.98 * bound < float(tensor.abs().max()) <= bound and abs(float(tensor.mean())) < bound / 20
    assert len({tuple(t.flatten()[:3].tolist()) for t in drawn[0].values() if t.any()}) == 4  # each its own


@pytest.mark.parametrize("targets", [("wq", "w2"), TARGETS], ids=" ".join)
def test_merged_is_apart(twin: Twin, targets: tuple[str, ...]) -> None:
    model, tokens = adapted(twin, *targets), twin.tokens(2, 9)
    expected, cached = logits_of(model, tokens), model(tokens, 0)
    merge_lora(model)
    assert_close(cached, expected, 1e-5)
    assert_close(logits_of(model, tokens), expected, 1e-5)
    assert {type(m) for m in model.modules()} == {type(m) for m in twin.ours.modules()}
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in twin.ours.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    for name, weight in twin.ours.named_parameters():
        targeted = name.split(".")[-2] in targets
        assert torch.equal(model.get_parameter(name), weight) != targeted


def test_biases_stay(place: Place, tmp_path: Path) -> None:
    """In both kinds of layers, with the adapter apart and merged."""
    args = ModelArgs(64, 1, 8, 2, 128, 32, qkv_bias=True, wo_bias=True, mlp_bias=True)
    model = Transformer(args)
    randomized(dict(model.named_parameters()))
    plain = copy.deepcopy(model)
    add_lora(model, Lora(4, 12, TARGETS), seed=1)
    tokens = torch.arange(8)[None]
    assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    randomized(lora_parameters(model))
    expected = logits_of(model, tokens)
    merge_lora(model)
    assert_close(logits_of(model, tokens), expected, 1e-5)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}


def test_a_model_in_bfloat16_has_an_adapter_in_float32(twin: Twin) -> None:
    tokens = twin.tokens(2, 9)
    expected = logits_of(adapted(twin), tokens)
    model = copy.deepcopy(twin.ours).bfloat16()
    add_lora(model, Lora(4, 12, TARGETS), seed=1)
    randomized(lora_parameters(model))
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    assert_close(logits_of(model, tokens), expected, 0.05)
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_close(logits_of(model, tokens), expected, 0.05)


def test_dropout(twin: Twin) -> None:
    """A share of A's input is zero, and the mean stays. W's input has no dropout, and evaluation has none at all."""
    model, plain = adapted(twin, "wq", dropout=0.25), adapted(twin, "wq")
    tokens = twin.tokens(1, 5)
    assert not torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    assert torch.equal(logits_of(model.eval(), tokens), logits_of(plain, tokens))
    layer, x = model.train().layers[0].attention.wq, torch.ones(4000, ARGS.dim)
    with torch.no_grad():
        actual, expected = layer(x), plain.layers[0].attention.wq(x[:1])
        assert_close(actual.mean(0, keepdim=True), expected, 0.02)
        layer.lora_A.fill_(1)
        layer.lora_B.fill_(1)
        seen = (layer(x) - x @ layer.weight.T)[:, 0] / 12 * 0.75  # alpha / r * r of the inputs that A saw
    assert_close(seen, seen.round(), 1e-3)
    assert float(seen.mean()) == pytest.approx(0.75 * ARGS.dim, rel=0.01)
    assert float(seen.var()) == pytest.approx(0.75 * 0.25 * ARGS.dim, rel=0.1)  # each input by itself


def test_training_lowers_the_loss(twin: Twin) -> None:
    model, tokens = copy.deepcopy(twin.ours), twin.tokens(2, 9)
    add_lora(model, Lora(4, 8, ("wq", "wk", "wv", "wo")), seed=1)
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = next_token_loss(model(tokens), tokens)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1}, "dropout is 1"),
        ({"targets": "wq"}, "targets is 'wq'"),
        ({"targets": [["wq"]]}, "targets is "),
        ({"targets": ()}, r"targets is \(\)"),
        ({"targets": ("wq", "q_proj")}, "q_proj.*wq, wk"),
        ({"targets": ("tok_embeddings",)}, "tok_embeddings.*output"),
    ],
)
def test_what_no_adapter_can_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        Lora(**wrong)


def test_what_has_no_place_for_an_adapter(twin: Twin, model: Transformer, tmp_path: Path, place: Place) -> None:
    for call in (merge_lora, lora_parameters, lambda m: save_adapter(m, tmp_path)):
        with pytest.raises(LlamaError, match="no adapter"):
            call(model)
    with pytest.raises(LlamaError, match="seed is 'x'"):
        add_lora(model, Lora(), "x")  # type: ignore[arg-type]
    save_adapter(adapted(twin), tmp_path / "adapter")
    add_lora(model, Lora(), 1)
    for call in (lambda m: add_lora(m, Lora(), 1), lambda m: load_adapter(m, tmp_path / "adapter")):
        with pytest.raises(LlamaError, match="has an adapter"):
            call(model)
    tied = Transformer(ModelArgs(64, 1, 8, 2, 128, 32, tied_embeddings=True))
    with pytest.raises(LlamaError, match="output, which in this model is the embedding"):
        add_lora(tied, Lora(targets=TARGETS), 1)
    save_checkpoint(tmp_path / "ckpt", ARGS, twin.ours.state_dict())
    model.layers[0].attention.wq = torch.nn.Linear(64, 64)
    merge_lora(model)
    with pytest.raises(LlamaError, match="fairscale"):
        add_lora(model, Lora(), 1)


def test_a_model_with_a_fast_form_takes_an_adapter(twin: Twin, place: Place, tmp_path: Path) -> None:
    """Its layers run plain with it, and packed once it is merged; both as in a model that was never packed."""
    save_checkpoint(tmp_path / "ckpt", ARGS, twin.ours.state_dict())
    accelerator, checkpoint = Accelerator(), open_checkpoint(tmp_path / "ckpt")
    fast = load_model(checkpoint, checkpoint.sizes, place, accelerator.pack_weight)
    accelerator.finish(fast)
    plain, tokens = load_model(checkpoint, checkpoint.sizes, place), twin.tokens(2, 9)
    before = fast(tokens, 0)
    for model in (fast, plain):
        add_lora(model, Lora(), 1)
        for name, parameter in lora_parameters(model).items():
            if name.endswith("lora_B"):
                parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    assert_close(fast(tokens, 0), plain(tokens, 0))
    merge_lora(fast), merge_lora(plain)
    assert_close(fast(tokens, 0), plain(tokens, 0))
    assert float((fast(tokens, 0) - before).abs().max()) > 1e-2


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_agree(pool: RankPool, twin: Twin, tmp_path: Path) -> None:
    """Outputs, gradients and files on 1, 2 and 4 ranks are the same; 4 ranks share 2 key/value heads."""
    save_checkpoint(tmp_path / "ckpt", ARGS, twin.ours.state_dict())
    extra = {"qa_outputs.weight": torch.randn(2, 64)}
    save_adapter(
        adapted(twin, dropout=0.3), tmp_path / "adapter", extra=extra, task_type="QUESTION_ANS", prefix="transformer"
    )
    actual = {}
    for ranks in (1, 2, 4):
        output = tmp_path / str(ranks)
        output.mkdir()
        arguments = [str(tmp_path / "ckpt"), str(tmp_path / "adapter"), str(output)]
        actual[ranks] = pool.run(lora_program.compute, *arguments, ranks=0 if ranks == 1 else ranks).results[0]
    one = actual[1]
    assert_close(one["merged"], one["logits"], 1e-5)
    assert float((one["dropped"] - one["logits"]).abs().max()) > 0.1
    for ranks in (2, 4):
        for name in ("logits", "dropped", "merged"):
            assert_close(actual[ranks][name], one[name], 1e-5)
        assert actual[ranks]["gradients"].keys() == one["gradients"].keys()
        for name, gradient in actual[ranks]["gradients"].items():
            assert_close(gradient, one["gradients"][name])
        assert torch.equal(actual[ranks]["extra"]["qa_outputs.weight"], extra["qa_outputs.weight"])
        assert "can't be written" in actual[ranks]["refused"]
        for name in ("saved", "fresh"):
            for file in (CONFIG, TENSORS):
                assert (tmp_path / str(ranks) / name / file).read_bytes() == (tmp_path / "1" / name / file).read_bytes()
