"""A hooked or replaced forward of the whole model takes part in every kind of generation.

The oracle is a loop by hand over `model(tokens, start_pos)`, and the hook's own effect, which is known.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARGS, write_checkpoint
from torch import Tensor

from llama import Llama, LlamaError, Transformer
from llama.rotary import RopeScaling

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 9, 8], [1, 2, 3, 4, 5]]
OPTIONS = {"max_seq_len": 32, "max_batch_size": 4, "device": "cpu", "dtype": "float32"}
FAVOURITE = 7  # the token that the intercepted model always chooses
Intercept = Callable[[Transformer, pytest.MonkeyPatch], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("intercepted"), ARGS, endless=True)


@pytest.fixture
def llama(checkpoint: Path) -> Llama:
    return Llama.build(checkpoint, **OPTIONS)


def favour(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., FAVOURITE] = 100
    return logits


def by_hook(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> object:
    return model.register_forward_hook(lambda module, args, logits: favour(logits))


def by_object(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> object:
    plain = model.forward
    model.forward = lambda *args, **kwargs: favour(plain(*args, **kwargs))  # type: ignore[method-assign]
    return None


def by_class(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> object:
    plain = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, *args, **kwargs: favour(plain(self, *args, **kwargs)))
    return None


def by_subclass(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> object:
    class Favouring(Transformer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return favour(super().forward(*args, **kwargs))

    model.__class__ = Favouring
    return None


INTERCEPTS = [by_hook, by_object, by_class, by_subclass]


@pytest.mark.parametrize("intercept", INTERCEPTS)
@pytest.mark.parametrize(
    "options", [{}, {"lookup_ngram": 2}, {"n": 1, "echo": True}, {"logits_processor": lambda ids, logits: logits}]
)
def test_every_step_goes_through_it(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, intercept: Intercept, options: dict[str, Any]
) -> None:
    intercept(llama.model, monkeypatch)
    tokens, _ = llama.generate(PROMPTS, 6, temperature=0, **options)
    prompts = PROMPTS if options.get("echo") else [[]] * len(PROMPTS)
    assert tokens == [[*prompt, *[FAVOURITE] * 6] for prompt in prompts]


@pytest.mark.parametrize("intercept", INTERCEPTS)
def test_beams_and_scores_go_through_it(llama: Llama, monkeypatch: pytest.MonkeyPatch, intercept: Intercept) -> None:
    intercept(llama.model, monkeypatch)
    (best,) = llama.complete([PROMPTS[0]], 4, temperature=0, num_beams=2)
    assert best.tokens == [FAVOURITE] * 4
    (score,) = llama.score(["abc"])
    logits = llama.model(torch.tensor([score.tokens]), 0)
    expected = logits.log_softmax(-1)[0, :-1].gather(-1, torch.tensor(score.tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(score.logprobs[1:]), expected)


def test_a_draft_model_goes_through_it(checkpoint: Path) -> None:
    llama = Llama.build(checkpoint, **OPTIONS, draft_ckpt_dir=checkpoint)
    for model in (llama.model, llama.draft):
        assert model is not None
        model.register_forward_hook(lambda module, args, logits: favour(logits))
    assert llama.generate(PROMPTS, 6, temperature=0)[0] == [[FAVOURITE] * 6] * 3
    assert llama.acceptance == 1


def test_a_pre_hook_sees_tokens_and_positions(llama: Llama) -> None:
    expected = llama.generate([PROMPTS[0]], 4, temperature=0)[0]
    seen: list[tuple[list[int], int]] = []
    llama.model.register_forward_pre_hook(lambda module, args: seen.append((args[0][0].tolist(), int(args[1]))))
    assert llama.generate([PROMPTS[0]], 4, temperature=0)[0] == expected
    assert seen == [(PROMPTS[0], 0), *(([token], 5 + i) for i, token in enumerate(expected[0][:-1]))]


def test_a_hook_holds_from_the_next_step_and_until_it_is_removed(llama: Llama) -> None:
    plain = llama.generate([PROMPTS[0]], 6, temperature=0)[0][0]
    assert FAVOURITE not in plain
    stream = llama.stream([PROMPTS[0]], 6, temperature=0)
    tokens = [next(stream)[0].token for _ in range(2)]
    handle = llama.model.register_forward_hook(lambda module, args, logits: favour(logits))
    tokens += [next(stream)[0].token for _ in range(2)]
    handle.remove()
    assert tokens == [*plain[:2], FAVOURITE, FAVOURITE]
    assert llama.generate([PROMPTS[0]], 6, temperature=0)[0][0] == plain


def test_what_is_not_logits_is_named(llama: Llama) -> None:
    llama.model.register_forward_hook(lambda module, args, logits: (logits,))
    with pytest.raises(LlamaError, match="hooked or replaced forward returned tuple, expected logits"):
        llama.generate([PROMPTS[0]], 2)


def test_padding_that_dynamic_scaling_must_know_of_is_refused(llama: Llama) -> None:
    scaling = RopeScaling(type="dynamic", factor=2.0, original_max_position_embeddings=16)
    args = replace(llama.model.params, rope_scaling=scaling)
    model = Transformer(args).eval()
    model.load_state_dict(llama.model.state_dict())
    dynamic = Llama(model, llama.tokenizer)
    expected = dynamic.generate([PROMPTS[0]], 20, temperature=0)[0]
    model.register_forward_hook(lambda module, args, logits: None)
    assert dynamic.generate([PROMPTS[0]], 20, temperature=0)[0] == expected
    with pytest.raises(LlamaError, match="can't be told the lengths"):
        dynamic.generate(PROMPTS, 2)
