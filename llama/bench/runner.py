"""How fast a model prefills and decodes, beside the bandwidth that the machine has meanwhile, and beside its peers.

    python -m llama bench                                                  random weights of a published shape
    python -m llama bench --ckpt_dir DIR --batch 1,8 --compare plain       a checkpoint's, and how they compare

Knows shapes and the order of things; leaves clocks to `measure`, models to `peers`, and what is shown to `figures`.
"""

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import parallel
from .._util.validate import check_count
from ..accelerate.accelerator import Acceleration, Accelerator
from ..accelerate.fast_model import FastModel
from ..accelerate.kernels.cpu import cpuinfo
from ..accelerate.quantization import BITS, Quantization, QuantizedMatrix, bits_of
from ..checkpoints.fit import check_memory, check_ranks
from ..checkpoints.loader import survey
from ..checkpoints.schema import part_sizes
from ..cli.program import checkpoint_or_demo
from ..errors import LlamaError
from ..generation import Llama
from ..model import ModelArgs, Transformer
from ..parallel import Place
from .measure import RAGGED, TURN, Bandwidth, Batch, Peak, Timed, interleaved
from .report import BenchReport, Figures, Ratio
from .subjects import Measured, NoText, Streaming, build_peers, check_peers, random_model

SHAPES = {  # of the published Llama 3.2 1B and 3B, and Llama 3 8B
    "1b": ModelArgs(2048, 16, 32, 8, 128256, 256, 1.5, tied_embeddings=True),
    "3b": ModelArgs(3072, 28, 24, 8, 128256, 256, 1.0, tied_embeddings=True),
    "8b": ModelArgs(4096, 32, 32, 8, 128256, 1024, 1.3),
}
DEFAULT_SHAPE, DEMO_SHAPE = "1b", "demo"


@dataclass(frozen=True)
class BenchConfig:
    """What to measure: each of `batches` (rows) with each of `prompts` (tokens), then `gen` tokens a row; and `RAGGED`.

    shape: of random weights, where there is no ckpt_dir. device, dtype, compile, quantization: as `Llama.build` has
    them. repeats: of each batch, after a warm-up. peers: names of `peers.PEERS`. Raises LlamaError for what no run
    could be.
    """

    ckpt_dir: str | None = None
    shape: str | None = None
    device: str | None = None
    dtype: str | None = None
    compile: bool = False
    quantization: Quantization | None = None
    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (512,)
    gen: int = 64
    ragged: bool = False
    repeats: int = 3
    peers: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, counts in (("--batch", self.batches), ("--prompt", self.prompts), ("--repeats", (self.repeats,))):
            for count in counts:
                check_count(name, count)
        if self.gen < 2:
            raise LlamaError(f"--gen is {self.gen}, expected at least 2: decoding begins with the second token")
        if self.ckpt_dir is not None and self.shape is not None:
            raise LlamaError("both --ckpt_dir and --shape were given: a checkpoint has a shape of its own, give one")

    @staticmethod
    def of(options: argparse.Namespace, **what: Any) -> "BenchConfig":
        """What a command's options say of the model, and `what` is measured of it."""
        built = ("ckpt_dir", "shape", "device", "dtype", "compile", "quantization")
        return BenchConfig(**{name: getattr(options, name) for name in built}, **what)

    @property
    def model(self) -> str:
        """What the report calls it."""
        return self.ckpt_dir or self.shape or DEFAULT_SHAPE

    @property
    def kinds(self) -> list[Batch]:
        """The batches to run."""
        alike = [Batch((prompt,) * rows, self.gen) for prompt in self.prompts for rows in self.batches]
        return list(dict.fromkeys([*alike, RAGGED] if self.ragged else alike))

    def build(self, place: Place) -> Llama:
        """The model that is measured, with room for every batch. Raises LlamaError for what can't work."""
        max_seq_len = max(max(batch.lengths) + batch.gen for batch in self.kinds)
        max_batch_size = max(len(batch.lengths) for batch in self.kinds)
        if self.ckpt_dir is None:
            args = replace(shape(self.model), max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            check_ranks(Path(f"shape {self.model}"), args, place.mp_size)
            check_memory(args, place, bits_of(self.quantization))
            return random_llama(args, place, self.compile, self.quantization)
        llama = Llama.build(
            self.ckpt_dir,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            device=self.device,
            dtype=self.dtype,
            compile=self.compile,
            quantization=self.quantization,
        )
        llama.tokenizer = NoText()
        return llama


def counts(option: str, text: str) -> list[int]:
    """The numbers of an option, which are divided by commas. Raises LlamaError for anything else."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise LlamaError(f"{option} is {text!r}, expected whole numbers with commas between, such as 1,8") from None


def shape(name: str) -> ModelArgs:
    """The sizes of this name. Raises LlamaError for others."""
    if name == DEMO_SHAPE:
        return survey(checkpoint_or_demo(None)).sizes
    if name not in SHAPES:
        raise LlamaError(f"--shape is {name!r}, expected one of {', '.join([*SHAPES, DEMO_SHAPE])}")
    return SHAPES[name]


def random_llama(args: ModelArgs, place: Place, compile: bool, quantization: Quantization | None) -> Llama:
    """A Llama of these sizes with random weights and without text."""
    accelerator = Accelerator(Acceleration(quantization, compile))
    model = random_model(args, place, accelerator.pack_weight)
    accelerator.finish(model)
    return Llama(model, NoText())


def quantization_of(model: Transformer) -> Quantization | None:
    """How its matrices are rounded, whether in the checkpoint or as they were loaded."""
    matrices = model.fast.packed_matrices if isinstance(model.fast, FastModel) else []
    bits = {matrix.bits for matrix in matrices if isinstance(matrix, QuantizedMatrix)}
    return next((name for name in BITS if BITS[name] in bits), None)


def cache_bytes(args: ModelArgs, mp_size: int, dtype: torch.dtype, batch: Batch) -> float:
    """Bytes of cached keys and values that a decoding step reads on one rank, on average over a run's steps."""
    per_position = 2 * max(args.kv_heads // mp_size, 1) * args.head_size * dtype.itemsize
    contexts = [length + batch.gen / 2 for length in batch.lengths]  # the mean of length + 1 to length + gen - 1
    window = args.sliding_window
    sliding = 0 if window is None else args.n_layers if args.sliding_layers is None else len(args.sliding_layers)
    within = sum(min(context, window or context) for context in contexts)
    return per_position * (sliding * within + (args.n_layers - sliding) * sum(contexts))


def carry_out(plan: BenchConfig) -> BenchReport:
    """Measure it, on every rank; the report of rank 0 is the one to show. Raises LlamaError for what can't work."""
    place = parallel.initialize(None, plan.device, None if plan.dtype == "auto" else plan.dtype)
    check_peers(plan.peers, place)
    with Peak() as peak:
        started = time.perf_counter()
        ours = Streaming("llama", plan.build(place))
        ready_seconds = time.perf_counter() - started
        warm_up(ours, plan.kinds, ours.llama.model.params.vocab_size)
    device_peak = torch.cuda.max_memory_allocated(place.device) if place.device.type == "cuda" else None
    args = ours.llama.model.params
    place = replace(place, dtype=ours.llama.model.dtype)
    quantization = quantization_of(ours.llama.model)
    peers = build_peers(plan.peers, ours.llama.model, place, plan.ckpt_dir, quantization)
    for peer in peers:
        warm_up(peer, plan.kinds, args.vocab_size)
    figures, ratios = compare([ours, *peers], plan, args, place)
    return BenchReport(
        model=plan.model,
        random_weights=plan.ckpt_dir is None,
        parameters=sum(part_sizes(args, 1).values()),
        dtype=str(place.dtype).removeprefix("torch."),
        compile=plan.compile,
        quantization=quantization,
        device=place.device.type,
        processor=processor_of(place.device),
        ranks=place.world_size,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        repeats=plan.repeats,
        ready_seconds=ready_seconds,
        peak_private=peak.private,
        peak_resident=peak.resident,
        peak_device=device_peak,
        figures=figures,
        ratios=ratios,
    )


def warm_up(subject: Measured, batches: Sequence[Batch], vocab_size: int) -> None:
    for batch in batches:
        Timed(subject, batch.prompts(vocab_size), batch.gen).go_on()


def compare(
    subjects: Sequence[Measured], plan: BenchConfig, args: ModelArgs, place: Place
) -> tuple[list[Figures], list[Ratio]]:
    """The figures of all subjects on all batches, and the ratios of the first subject to the others."""
    bandwidth = Bandwidth(place.device)
    figures: list[Figures] = []
    ratios: list[Ratio] = []
    for batch in plan.kinds:
        # A GPU would go on with a step that was started while others have their turn.
        turn = TURN if place.device.type == "cpu" else batch.gen
        runs = interleaved(subjects, batch.prompts(args.vocab_size), batch.gen, plan.repeats, bandwidth, turn)
        cache = cache_bytes(args, place.mp_size, place.dtype, batch)
        for subject, own in zip(subjects, runs, strict=True):
            figures.append(Figures.of(subject.name, batch, own, subject.weight_bytes + cache))
        for peer, theirs in zip(subjects[1:], runs[1:], strict=True):
            ratios.append(Ratio.of(peer.name, batch, runs[0], theirs))
    return figures, ratios


def processor_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpuinfo("model name") or platform.processor() or platform.machine()
