"""What tests/engine/test_serving.py runs on ranks: one rank that asks alone, and calls that differ."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from llama import Llama, LlamaError
from llama.parallel import is_group_leader, is_main_process
from llama.session import Session

OPTIONS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 3, "device": "cpu", "dtype": "float32"}
PROMPTS = [[i, *range(7, 7 + 3 * i)] for i in range(1, 7)]
LONG = [list(range(k, k + 60)) for k in (1, 2, 3)]  # more than one message holds at once


def fail(logits: Any, context: Any) -> Any:
    raise ValueError("the processor says no")


def lead_and_follow(directory: str) -> dict[str, Any]:
    """What was found where this rank leads, and by a call that all ranks make afterwards."""
    llama = Llama.build(directory, **OPTIONS, draft_ckpt_dir=directory)
    found: dict[str, Any] = {}
    if is_group_leader():
        with llama.engine.lead():
            found = ask(llama)
    else:
        llama.engine.follow()
    sampled = llama.text_completion(["after all"], 0.8, max_gen_len=8, seed=3)
    return {**found, "after": [sampled, llama.complete(LONG, 5, temperature=0)[2].tokens]}


def ask(llama: Llama) -> dict[str, Any]:
    def complete(prompt: list[int]) -> list[int]:
        return llama.complete([prompt], 12, temperature=0.8, seed=5)[0].tokens

    with ThreadPoolExecutor(6) as threads:
        tokens: list[Any] = list(threads.map(complete, PROMPTS))
    tokens += [c.tokens for c in llama.complete(LONG, 9, temperature=0, n=2, lookup_ngram=1)]
    tokens += [c.tokens for c in llama.complete(PROMPTS[:2], 9, temperature=0, num_beams=3)]
    session = Session(llama)
    tokens += [[step.token for step in session.stream(LONG[0], 9, seed=1)] for _ in range(2)] + [session.reused]
    stream = llama.stream(LONG, 20, seed=1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    refused = []
    for prompts, options in (([[]], {}), (PROMPTS[:2], {"rows": [None, {"logits_processor": fail}]})):
        try:
            llama.complete(prompts, 5, temperature=0, **options)
        except LlamaError as e:
            refused.append(str(e))
    tokens.append(llama.score(["a text of some length"])[0].tokens)
    return {"tokens": tokens, "embedded": llama.embed(["hello"], "mean")[0].tolist(), "refused": refused}


def serve_on_ranks(directory: str) -> list[list[int]] | None:
    llama = Llama.build(directory, **OPTIONS)
    if not is_group_leader():
        llama.engine.follow()
        return None
    with llama.engine.serve():
        requests = [llama.engine.submit(prompt, max_gen_len=12, temperature=0) for prompt in PROMPTS]
        return [[step.token for step in request] for request in requests]


def call_differently(directory: str) -> tuple[str, str, str, str]:
    """Messages of calls that differ, and the answer to one that doesn't."""
    llama = Llama.build(directory, **OPTIONS)
    first = is_main_process()
    calls = (
        lambda: llama.text_completion(["a" if first else "b"], max_gen_len=3),
        lambda: llama.complete([[1, 2]], 3, temperature=0.5 if first else 0.6),
        lambda: llama.score(["a"]) if first else llama.embed(["a"]),
        lambda: llama.text_completion(["a"], 0, max_gen_len=3)[0]["generation"],
    )
    found = []
    for call in calls:
        try:
            found.append(str(call()))
        except LlamaError as e:
            found.append(str(e))
    return found[0], found[1], found[2], found[3]


def edit_and_lead(directory: str) -> list[list[int]] | None:
    """Answers after edits and with a hook, all of them made on every rank."""
    llama = Llama.build(directory, **OPTIONS)
    llama.complete(PROMPTS[:2], 4, temperature=0)
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.attention_norm.weight.mul_(1.5)
    answers = lead_once(llama)
    handle = llama.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.25)
    hooked = lead_once(llama)
    handle.remove()
    last = lead_once(llama)
    return None if answers is None else [*answers, *(hooked or []), *(last or [])]


def lead_once(llama: Llama) -> list[list[int]] | None:
    if not is_group_leader():
        llama.engine.follow()
        return None
    with llama.engine.lead():
        return [c.tokens for c in llama.complete(PROMPTS[:2], 8, temperature=0)]


def stream_differently(directory: str) -> dict[str, Any]:
    """What ranks find that drain streams in another order, or leave them at different places."""
    llama, first = Llama.build(directory, **OPTIONS), is_main_process()
    found: dict[str, Any] = {}

    def attempt(name: str, act: Callable[[], Any]) -> None:
        try:
            found[name] = act()
        except LlamaError as e:
            found[name] = str(e)
        gc.collect()

    def drain(order: list[int]) -> list[list[int]]:
        streams = [llama.stream([prompt], 8, temperature=0) for prompt in PROMPTS[:2]]
        tokens: list[list[int]] = [[], []]
        for i in order:
            tokens[i] = [step.token for steps in streams[i] for step in steps]
        return tokens

    def leave(leaves: bool) -> str:
        stream = llama.stream([PROMPTS[2]], 20, temperature=0)
        for count, _ in enumerate(stream):
            if leaves and count == 3:
                stream.close()  # type: ignore[attr-defined]
                break
        llama.complete([PROMPTS[0]], 3, temperature=0)
        return "ended"

    attempt("in turn", lambda: drain([1, 0]))
    attempt("other order", lambda: drain([0, 1] if first else [1, 0]))
    attempt("left by 0", lambda: leave(first))
    attempt("left by 1", lambda: leave(not first))
    attempt("led alone", lambda: lead_once(llama) if first else llama.complete([PROMPTS[0]], 3, temperature=0))
    attempt("after", lambda: llama.complete([PROMPTS[1]], 6, temperature=0)[0].tokens)
    return found
