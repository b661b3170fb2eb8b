"""What tests/engine/test_beam_search.py runs on ranks: a search, and one in which the rank that chooses fails."""

from torch import Tensor

from llama import Llama, LlamaError
from llama.engine.beam_search import Beam, Beams, beam_search
from llama.parallel import is_group_leader


def fail_at_the_third_token(logprobs: Tensor, prompt: list[int], answer: list[int]) -> Tensor:
    assert is_group_leader()
    if len(answer) == 2:
        raise LlamaError("the process says no")
    return logprobs


def search(ckpt_dir: str, prompts: list[list[int]]) -> tuple[list[list[Beam]], str]:
    """(the beams of each prompt, the message of the search that fails)."""
    engine = Llama.build(ckpt_dir, max_seq_len=96, max_batch_size=12, device="cpu", dtype="float32").engine
    stops = frozenset(range(0, 512, 16))
    beams = beam_search(engine, prompts, Beams(4, num_return_sequences=4), 20, stops)
    try:
        beam_search(engine, [[1]], Beams(2), 9, frozenset(), fail_at_the_third_token)
    except LlamaError as e:
        return beams, str(e)
    return beams, "nothing was refused"
