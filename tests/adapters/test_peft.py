"""Adapters on disk: peft reads what we save, and we read what peft saves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_adapters
import torch
from conftest import Twin, assert_close
from safetensors.torch import load_file, save_file
from tiny_adapters import CONFIG, NAMES, TENSORS, adapted, logits_of, open_adapter, save, wrapped
from torch import nn

from llama import LlamaError, Transformer
from llama.adapters import peft as adapter
from llama.adapters.lora import TARGETS
from llama.adapters.peft import load_adapter, save_adapter

twin, model, peft = tiny_adapters.twin, tiny_adapters.model, tiny_adapters.peft
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what peft asks of models


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
