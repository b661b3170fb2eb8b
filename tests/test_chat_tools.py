"""Calls of tools from `chat_completion`, by models whose answers are forced, token by token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from published_tokenizers import AGENT, IM, TOOL, USER, qwen, save
from tiny import ARGS, write_checkpoint

from llama import Llama
from llama.model import Transformer
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.protocol import AnyTokenizer
from llama.tokenizer import Tokenizer

QWEN_ANSWER = '<think>\nHm.\n</think>\n\nSee.\n<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
LLAMA_ANSWER = '<|python_tag|>{"name": "now", "parameters": {"zone": "UTC"}}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), ARGS)
    return Llama.build(folder, max_seq_len=1024, device="cpu", dtype="float32").model


def make_llama(model: Transformer, folder: Path) -> Llama:
    """One whose tokenizer is Llama 3.1's."""
    path = write_checkpoint(folder) / "tokenizer.model"
    return Llama(model, Tokenizer(path, is_llama_3_1=True))


def make_qwen(model: Transformer, folder: Path) -> Llama:
    path = save(folder, qwen(), {**IM, "chat_template": AGENT})
    return Llama(model, HFTokenizer(path))


def force(tokenizer: AnyTokenizer, answer: str) -> dict[str, Any]:
    """Settings that make the model write this answer, in which names are control tokens, up to a stop."""
    tokens = tokenizer.encode(answer, bos=False, eos=False, allowed_special="all")
    stop = [] if tokens[-1] in tokenizer.stop_tokens else [min(tokenizer.stop_tokens)]
    written = iter(tokens + stop)

    def processor(_: list[int], logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e9)
        forced[next(written)] = 0.0
        return forced

    return {"logits_processor": processor, "temperature": 0.0, "max_gen_len": 300}


def answer(llama: Llama, text: str, dialog: Any = (USER,), **options: Any) -> dict[str, Any]:
    (prediction,) = llama.chat_completion([list(dialog)], **force(llama.tokenizer, text), **options)
    return dict(prediction)


def test_qwen_s_calls_reasoning_and_content(model: Transformer, tmp_path: Path) -> None:
    llama = make_qwen(model, tmp_path)
    generation = answer(llama, QWEN_ANSWER, tools=[TOOL])["generation"]
    (call,) = generation.pop("tool_calls")
    assert generation == {"role": "assistant", "content": "See.", "reasoning_content": "Hm."}
    assert len(call.pop("id")) == len("call_") + 24
    assert call == {"type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}


@pytest.mark.parametrize("options", [{}, {"tools": None}, {"tools": []}])
def test_without_tools_all_is_content(model: Transformer, tmp_path: Path, options: dict[str, Any]) -> None:
    for make, text in ((make_qwen, QWEN_ANSWER), (make_llama, LLAMA_ANSWER)):
        folder = tmp_path / make.__name__
        folder.mkdir()
        assert answer(make(model, folder), text, **options)["generation"] == {"role": "assistant", "content": text}


@pytest.mark.parametrize("stop", ["<|eom_id|>", "<|eot_id|>"])
def test_llama_s_call_after_its_control_token(model: Transformer, tmp_path: Path, stop: str) -> None:
    """The token before the call is seen, and the token after it is a stop."""
    llama = make_llama(model, tmp_path)
    prediction = answer(llama, LLAMA_ANSWER + stop, tools=[TOOL])
    assert prediction["finish_reason"] == "stop"
    assert prediction["stop"] == llama.tokenizer.special_tokens[stop]
    assert prediction["generation"]["content"] == ""
    (call,) = prediction["generation"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": '{"zone": "UTC"}'}


def test_what_is_no_call_is_content(model: Transformer, tmp_path: Path) -> None:
    llama = make_llama(model, tmp_path)
    for text in ("Noon.", "<|python_tag|>print(1)", LLAMA_ANSWER[:-1]):
        assert answer(llama, text, tools=[TOOL])["generation"] == {"role": "assistant", "content": text}


def test_reasoning_that_the_prompt_has_opened(model: Transformer, tmp_path: Path) -> None:
    template = AGENT.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    llama = Llama(model, HFTokenizer(save(tmp_path, qwen(), {**IM, "chat_template": template})))
    generation = answer(llama, QWEN_ANSWER.removeprefix("<think>\n"), tools=[TOOL])["generation"]
    assert (generation["reasoning_content"], generation["content"]) == ("Hm.", "See.")
    assert len(generation["tool_calls"]) == 1


def test_ids_come_of_what_is_generated(model: Transformer, tmp_path: Path) -> None:
    llama = make_qwen(model, tmp_path)
    first, again, other = (
        answer(llama, QWEN_ANSWER, dialog, tools=[TOOL])["generation"]["tool_calls"][0]["id"]
        for dialog in ([USER], [USER], [{"role": "user", "content": "When?"}])
    )
    assert first == again != other


def test_a_message_with_calls_goes_on_in_the_dialog(model: Transformer, tmp_path: Path) -> None:
    llama = make_qwen(model, tmp_path)
    generation = answer(llama, QWEN_ANSWER, tools=[TOOL])["generation"]
    dialog = [USER, generation, {"role": "tool", "content": "noon", "tool_call_id": generation["tool_calls"][0]["id"]}]
    assert answer(llama, "It is noon.", dialog, tools=[TOOL])["generation"]["content"] == "It is noon."
