"""What tests/engine/test_serving.py runs on ranks: one rank that asks alone, and calls that differ."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
