"""Low-rank adapters against the peft library, in memory and on disk, on several ranks; and bad directories."""

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_program
import pytest
import torch
from conftest import Twin, assert_close, make_twin, neighbours, next_token_loss
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama import LlamaError, ModelArgs, Transformer
from llama.accelerate.accelerator import Accelerator
from llama.adapters import peft as adapter
from llama.adapters.lora import TARGETS, Lora, LoraLinear, add_lora, lora_parameters, merge_lora
from llama.adapters.peft import load_adapter, save_adapter
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.checkpoints.meta import save_checkpoint
from llama.parallel import Place

ARGS = ModelArgs(64, 2, 8, 2, 128, 32)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "lm_head"]
NAMES = dict(zip(TARGETS, PROJECTIONS, strict=True))
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model.model.layers"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what peft asks of models


@pytest.fixture(scope="module")
def twin(place: Place) -> Twin:
    return make_twin(ARGS)


@pytest.fixture
def model(twin: Twin) -> Transformer:
    return copy.deepcopy(twin.ours)


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


def randomized(parameters: dict[str, Tensor]) -> None:
    """Random numbers for A and B, large enough that a wrong one shows."""
    generator = torch.Generator().manual_seed(11)
    for name in sorted(parameters):
        parameters[name].data.normal_(std=0.2, generator=generator)


def adapted(twin: Twin, *targets: str, **options: Any) -> Transformer:
    model = copy.deepcopy(twin.ours)
    add_lora(model, Lora(4, 12, targets or TARGETS, **options), seed=1)
    randomized(lora_parameters(model))
    return model


def wrapped(peft: Any, twin: Twin, *targets: str, **options: Any) -> Any:
    """The same adapter put on by peft."""
    config = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "target_modules": [*targets], **options}
    theirs = peft.get_peft_model(copy.deepcopy(twin.theirs), peft.LoraConfig(**config)).eval()
    randomized({name: p for name, p in theirs.named_parameters() if "lora_" in name})
    return theirs


def save(theirs: Any, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the output layer's own matrix is written too
        theirs.save_pretrained(directory)
    return directory


def open_adapter(peft: Any, base: Any, directory: Path) -> Any:
    """Loaded by peft without a warning, which it gives for missing and for surplus tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, on what peft calls
        return peft.PeftModel.from_pretrained(base, directory).eval()


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens) if isinstance(model, Transformer) else model(input_ids=tokens, use_cache=False).logits


def hf_key(name: str, suffix: str = "") -> str:
    """Our name of an adapter's parameter -> peft's."""
    *place, layer, kind = name.split(".")
    if not place:
        return f"base_model.model.lm_head.{kind}{suffix}.weight"
    part = "self_attn" if place[-1] == "attention" else "mlp"
    return f"{ROOT}.{place[1]}.{part}.{NAMES[layer]}.{kind}{suffix}.weight"


def in_our_order(name: str, tensor: Tensor) -> Tensor:
    heads = {"wq.lora_B": ARGS.n_heads, "wk.lora_B": ARGS.n_kv_heads}.get(".".join(name.split(".")[-2:]))
    return tensor if heads is None else neighbours(tensor, heads)


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


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("wq", "wv"), ("wk", "w3"), ("output",), TARGETS], ids=" ".join)
def test_peft_reads_what_is_saved(twin: Twin, peft: Any, tmp_path: Path, targets: tuple[str, ...]) -> None:
    model, tokens = adapted(twin, *targets, dropout=0.1).eval(), twin.tokens(2, 9)
    save_adapter(model, tmp_path, "some/model")
    theirs = open_adapter(peft, copy.deepcopy(twin.theirs), tmp_path)
    assert_close(logits_of(theirs, tokens), logits_of(model, tokens), 1e-5)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.1)
    assert (config.task_type, config.base_model_name_or_path) == ("CAUSAL_LM", "some/model")
    assert set(config.target_modules) == {NAMES[target] for target in targets}
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]


VARIANTS: dict[str, dict[str, Any]] = {
    "rank-stabilized": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "a pattern": {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": 0},
    "all but": {"target_modules": ["k_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "whole names": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]},
    "sizes of their own": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"k_proj": 2, "^model.layers.0.self_attn.q_proj": 8},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 40, "q_proj": 6.5},
    },
    "in bfloat16": {"target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_saves_is_read_and_saved_again(twin: Twin, peft: Any, tmp_path: Path, variant: str) -> None:
    theirs, ours, tokens = wrapped(peft, twin, **VARIANTS[variant]), copy.deepcopy(twin.ours), twin.tokens(2, 9)
    if variant == "in bfloat16":
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16().float()
    save(theirs, tmp_path / "theirs")
    if variant == "in bfloat16":
        tensors = load_file(tmp_path / "theirs" / TENSORS)
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "theirs" / TENSORS)
    assert load_adapter(ours, tmp_path / "theirs") == {}
    expected = logits_of(theirs, tokens)
    assert_close(logits_of(ours, tokens), expected, 1e-5)
    save_adapter(ours, tmp_path / "ours")
    again = open_adapter(peft, copy.deepcopy(twin.theirs), tmp_path / "ours")
    assert_close(logits_of(again, tokens), expected, 1e-5)
    assert load_file(tmp_path / "ours" / TENSORS).keys() == load_file(tmp_path / "theirs" / TENSORS).keys()


HEADS = {
    "SEQ_CLS": ("LlamaForSequenceClassification", "model", {"score.weight": (3, 64)}),
    "TOKEN_CLS": ("LlamaForTokenClassification", "model", {"score.weight": (3, 64), "score.bias": (3,)}),
    "QUESTION_ANS": (
        "LlamaForQuestionAnswering",
        "transformer",
        {"qa_outputs.weight": (2, 64), "qa_outputs.bias": (2,)},
    ),
}


@pytest.mark.parametrize("task", HEADS)
def test_heads_come_along(twin: Twin, peft: Any, tmp_path: Path, task: str) -> None:
    """Files that we write give peft's model our hidden states and head, and the other way round."""
    import transformers

    class_name, prefix, shapes = HEADS[task]
    extra = {name: torch.randn(shape) for name, shape in shapes.items()}
    model, tokens = adapted(twin, "wq", "w2"), twin.tokens(1, 9)
    save_adapter(model, tmp_path / "ours", extra=extra, task_type=task, prefix=prefix)  # type: ignore[arg-type]
    config = copy.deepcopy(twin.theirs.config)
    config.num_labels, config.pad_token_id = shapes[next(iter(shapes))][0], 0
    base = getattr(transformers, class_name)(config).eval()
    getattr(base, prefix).load_state_dict(twin.theirs.model.state_dict())
    theirs = open_adapter(peft, base, tmp_path / "ours")
    with torch.no_grad():
        answer = theirs(input_ids=tokens, use_cache=False) if task != "SEQ_CLS" else theirs(input_ids=tokens)
        weight, bias = (extra.get(f"{next(iter(shapes)).split('.')[0]}.{kind}") for kind in ("weight", "bias"))
        expected = nn.functional.linear(model.hidden_states(tokens), weight, bias)
    if task == "QUESTION_ANS":
        assert_close(torch.stack([answer.start_logits, answer.end_logits], -1), expected, 1e-5)
    else:
        assert_close(answer.logits, expected[:, -1] if task == "SEQ_CLS" else expected, 1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(twin.ours)
    actual = load_adapter(again, tmp_path / "theirs")
    assert actual.keys() == extra.keys() and all(torch.equal(actual[name], extra[name]) for name in extra)
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


def test_a_base_that_was_trained_is_refused(twin: Twin, peft: Any, tmp_path: Path) -> None:
    """peft also writes the matrix of an adapted output layer. If it isn't this model's, nothing is loaded."""
    theirs = wrapped(peft, twin, "q_proj", "lm_head")
    theirs.base_model.model.lm_head.base_layer.weight.data[5, 6] += 1
    save(theirs, tmp_path)
    with pytest.raises(LlamaError, match=r"lm_head.*merge_and_unload"):
        load_adapter(copy.deepcopy(twin.ours), tmp_path)
    trained = wrapped(peft, twin, "q_proj", modules_to_save=["embed_tokens"])
    trained.base_model.model.model.embed_tokens.modules_to_save.default.weight.data[5, 6] += 1
    with pytest.raises(LlamaError, match=r"embed_tokens.*merge_and_unload"):
        load_adapter(copy.deepcopy(twin.ours), save(trained, tmp_path / "embedding"))


def test_a_write_that_fails_leaves_the_adapter_of_before(
    twin: Twin, model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = adapted(twin, "wq")
    save_adapter(before, tmp_path / "kept")

    def full(*args: object, **options: object) -> None:
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "save_file", full)
        for name in ("kept", "new"):
            with pytest.raises(LlamaError, match=f"{name} can't be written.*No space"):
                save_adapter(adapted(twin, "wk"), tmp_path / name)
    assert not (tmp_path / "new").exists()
    load_adapter(model, tmp_path / "kept")
    assert torch.equal(logits_of(model, twin.tokens(1, 5)), logits_of(before, twin.tokens(1, 5)))
    save_adapter(adapted(twin, "wk"), tmp_path / "kept")
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [CONFIG, TENSORS]
    (tmp_path / "file").touch()
    with pytest.raises(LlamaError, match="file can't be written"):
        save_adapter(before, tmp_path / "file")
    for wrong in ({"task_type": "CHAT"}, {"prefix": "bert"}, {"extra": {"score": torch.ones(2)}}):
        with pytest.raises(LlamaError, match=next(iter(wrong))):
            save_adapter(before, tmp_path / "wrong", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "wrong").exists()


# --- directories that are bad ----------------------------------------------------------------------------------------

Tensors, Config = dict[str, Tensor], dict[str, Any]


def changed(**keys: Any) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: config.update(keys)


def renamed(old: str, new: str) -> Callable[[Tensors, Config], None]:
    def edit(tensors: Tensors, config: Config) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def put(key: str, tensor: Tensor) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: tensors.update({key: tensor})


A, B = (f"{ROOT}.1.self_attn.q_proj.lora_{x}.weight" for x in "AB")
BAD: list[tuple[Callable[[Tensors, Config], None], str]] = [
    (lambda tensors, config: tensors.pop(B), f"{TENSORS}.*missing {B}"),
    (lambda tensors, config: [tensors.pop(key) for key in (A, B)], f"missing {A}; missing {B}"),
    (lambda tensors, config: (tensors.clear(), config.update(target_modules=".*"))[0], "no layer has an adapter"),
    (put(A, torch.ones(3, 64)), rf"{A} of shape \(3, 64\), expected \(4, 64\)"),
    (put(B, torch.ones(32, 4)), rf"{B} of shape \(32, 4\), expected \(64, 4\)"),
    (put(A, torch.ones(())), rf"{A} of shape \(\), expected \(4, 64\)"),
    (put(A, torch.ones(4, 64, dtype=torch.int8)), f"{A} of torch.int8"),
    (put(A.replace(".1.", ".2."), torch.ones(4, 64)), r"surplus .*layers\.2\.self_attn"),
    (put("base_model.model.score.weight", torch.ones(2, 64)), "surplus .*score"),
    (renamed(A, A.removeprefix("base_model.model.")), "surplus .*missing"),
    (renamed(A, A.replace("q_proj", "c_attn")), "surplus .*c_attn.*missing"),
    (put(A.replace("lora_A", "lora_magnitude_vector"), torch.ones(64)), "surplus .*magnitude"),
    (changed(peft_type="IA3"), f"{CONFIG}: peft_type is 'IA3', expected 'LORA'"),
    (changed(peft_type=None), "peft_type is None"),
    (changed(use_dora=True), "use_dora.*plain LoRA"),
    (changed(fan_in_fan_out=True), "fan_in_fan_out.*plain LoRA"),
    (changed(a_feature_to_come={"x": 1}), "a_feature_to_come.*plain LoRA"),
    (changed(bias="all"), "bias is 'all', expected 'none'"),
    (changed(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    (changed(r=8), r"of shape \(4, 64\), expected \(8, 64\)"),
    (changed(r="4"), "r is '4', expected a whole number"),
    (changed(r=None), "r is None"),
    (changed(lora_alpha=0), "lora_alpha is 0"),
    (changed(lora_alpha=None), "lora_alpha is None"),
    (changed(lora_dropout=1.0), "lora_dropout is 1.0"),
    (changed(target_modules=["query"]), "target_modules has 'query', expected names such as .*q_proj"),
    (changed(target_modules=["q_proj", "v_proj", "k_proj"]), "missing .*k_proj"),
    (changed(target_modules="all-linear"), "missing .*; and [0-9]+ more problems"),
    (changed(target_modules=[3]), "target_modules has 3"),
    (changed(target_modules=None), "target_modules is None"),
    (changed(rank_pattern={"(a+)+$": 4}), "rank_pattern has '.a"),
    (changed(rank_pattern={"q_proj": 0}), "r is 0"),
    (changed(rank_pattern={"q_proj": 10**400}, use_rslora=True), "r is 1000"),
    (changed(rank_pattern=[4]), "rank_pattern is .4., expected a dict"),
    (changed(modules_to_save="score"), "modules_to_save is 'score', expected a list"),
]


@pytest.fixture(scope="module")
def good(twin: Twin, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Config]:
    directory = tmp_path_factory.mktemp("good")
    save_adapter(adapted(twin, "wq", "wv"), directory)
    return load_file(directory / TENSORS), json.loads((directory / CONFIG).read_text())


def write(directory: Path, tensors: Tensors, config: object) -> Path:
    save_file(tensors, directory / TENSORS)
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_adapters(twin: Twin, good: tuple[Tensors, Config], tmp_path: Path, case: int) -> None:
    """Refused in one line that names what was found and expected. The model stays as it was."""
    (edit, message), (tensors, config) = BAD[case], copy.deepcopy(good)
    edit(tensors, config)
    assert_refused(twin, write(tmp_path, tensors, config), message)


def assert_refused(twin: Twin, directory: Path, message: str) -> None:
    model = copy.deepcopy(twin.ours)
    with pytest.raises(LlamaError, match=message) as caught:
        load_adapter(model, directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters()) and model.training


def test_bad_files(twin: Twin, good: tuple[Tensors, Config], tmp_path: Path) -> None:
    assert_refused(twin, tmp_path / "nowhere", f"{CONFIG} is missing")
    write(tmp_path, *good)
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[:-100])
    assert_refused(twin, tmp_path, f"{TENSORS} is truncated")
    (tmp_path / TENSORS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_refused(twin, tmp_path, "git lfs pull")
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    assert_refused(twin, tmp_path, f"{TENSORS} is missing.*adapter_model.bin is the older form")
    (tmp_path / TENSORS).write_bytes(whole)
    for text in ("", "[]", "{", '{"peft_type": "LORA"}'):
        (tmp_path / CONFIG).write_text(text)
        assert_refused(twin, tmp_path, CONFIG)


def test_another_models_adapter(place: Place, good: tuple[Tensors, Config], tmp_path: Path) -> None:
    wider = Twin(Transformer(ModelArgs(96, 2, 8, 2, 128, 32)), None)  # type: ignore[arg-type]
    assert_refused(wider, write(tmp_path, *good), r"lora_A.weight of shape \(4, 64\), expected \(4, 96\)")
    deeper = Twin(Transformer(ModelArgs(64, 3, 8, 2, 128, 32)), None)  # type: ignore[arg-type]
    assert_refused(deeper, tmp_path, re.escape(f"missing {ROOT}.2.self_attn.q_proj.lora_A.weight"))


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES |= st.lists(VALUES, max_size=2) | st.dictionaries(st.text(max_size=5), VALUES, max_size=2)
KEYS = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save", "bias"]
KEYS += ["rank_pattern", "alpha_pattern", "init_lora_weights", "task_type", "layers_to_transform", "use_dora", "other"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_configuration_is_read_or_refused(
    good: tuple[Tensors, Config], tmp_path: Path, values: dict[str, Any]
) -> None:
    tensors, config = good
    try:
        actual = adapter.read_adapter(write(tmp_path, tensors, {**config, **values}), ARGS)
    except LlamaError:
        return
    assert actual.sizes.keys() == {f"layers.{i}.attention.{name}" for i in range(2) for name in ("wq", "wv")}
    assert all(stored.shape in ((4, 64), (64, 4), (16, 4)) for stored in actual.tensors.values())


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
