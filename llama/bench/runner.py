"""Runs the benchmark: how fast a model prefills and decodes, compared with the memory bandwidth and with its peers.

    python -m llama bench                                                  random weights of a published shape
    python -m llama bench --ckpt_dir DIR --batch 1,8 --compare plain       a checkpoint, compared with its plain form

Knows shapes and the order of steps; `measure` knows clocks, `subjects` knows models, `report` what is printed.
"""

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch

from .._util.validate import check_count
from ..accelerate.accelerator import Acceleration, Accelerator, find_place
from ..accelerate.fast_model import FastModel
from ..accelerate.kernels.build import cpuinfo
from ..accelerate.quantization import BITS, Quantization, QuantizedMatrix, bits_of
from ..checkpoints.demo import demo_checkpoint
from ..checkpoints.fit import check_memory, check_ranks
from ..checkpoints.loader import survey
from ..checkpoints.schema import part_sizes
from ..errors import LlamaError, shorten
from ..generation import PREFILL_CHUNK, Llama
from ..model import ModelArgs, Transformer
from ..parallel import Place
from .measure import RAGGED, STEPS_PER_TURN, BandwidthMeter, Batch, PeakMemory, TimedRun, time_interleaved
from .report import BenchReport, PeerRatio, SubjectFigures
from .subjects import LlamaSubject, ModelSubject, NoText, build_peers, build_random_model, check_peers

SHAPES = {  # the published sizes of Llama 3.2 1B and 3B, and of Llama 3 8B
    "1b": ModelArgs(2048, 16, 32, 8, 128256, 256, 1.5, tied_embeddings=True),
    "3b": ModelArgs(3072, 28, 24, 8, 128256, 256, 1.0, tied_embeddings=True),
    "8b": ModelArgs(4096, 32, 32, 8, 128256, 1024, 1.3),
}
DEFAULT_SHAPE, DEMO_SHAPE = "1b", "demo"


@dataclass(frozen=True)
class ModelConfig:
    """Which model to measure, and in which form. Raises LlamaError for values that don't go together."""

    ckpt_dir: str | None = None  # a checkpoint; None: random weights of `shape`
    adapter_dir: str | None = None  # an adapter of the checkpoint
    shape: str | None = None  # a name in SHAPES, or DEMO_SHAPE; None: DEFAULT_SHAPE
    # As of `Llama.build`:
    device: str | None = None
    dtype: str | None = None
    compile: bool = False
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.adapter_dir is not None and self.ckpt_dir is None:
            raise LlamaError("--adapter_dir was given without --ckpt_dir: give the base's directory too")
        if self.ckpt_dir is not None and self.shape is not None:
            raise LlamaError("both --ckpt_dir and --shape were given: a checkpoint has a shape of its own, give one")

    @classmethod
    def from_options(cls, options: argparse.Namespace, **measured: Any) -> Self:
        """The model from a command's options. measured: the fields of a subclass."""
        names = [field.name for field in fields(ModelConfig)]
        return cls(**{name: getattr(options, name) for name in names}, **measured)

    @property
    def model(self) -> str:
        """The model's name in the report."""
        return self.ckpt_dir or self.shape or DEFAULT_SHAPE

    def find_place(self) -> Place:
        """Where this rank computes, and in which numbers; with dtype "auto", in the device's best until it is built."""
        return find_place(None, self.device, None if self.dtype == "auto" else self.dtype)

    def build_llama(self, place: Place, max_seq_len: int, max_batch_size: int, prefill_chunk: int) -> Llama:
        """The model with room for so many rows. No token stops generation, so that its length is known.

        Raises LlamaError if it can't be loaded or doesn't fit.
        """
        if self.ckpt_dir is None:
            args = replace(find_shape(self.model), max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            check_ranks(Path(f"shape {self.model}"), args, place.mp_size)
            check_memory(args, place, bits_of(self.quantization))
            return build_random_llama(args, place, self.compile, self.quantization, prefill_chunk)
        llama = Llama.build(
            self.ckpt_dir,
            adapter_dir=self.adapter_dir,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            prefill_chunk=prefill_chunk,
            device=self.device,
            dtype=self.dtype,
            compile=self.compile,
            quantization=self.quantization,
        )
        llama.tokenizer.stop_tokens = set()
        return llama


@dataclass(frozen=True)
class BenchConfig(ModelConfig):
    """What to measure, on which model. Raises LlamaError for values that no run can have."""

    # Every number of `batches` is run with every one of `prompts`.
    batches: Sequence[int] = (1,)  # prompts at a time
    prompts: Sequence[int] = (512,)  # tokens of each prompt
    gen: int = 64  # tokens to generate for each prompt
    ragged: bool = False  # whether to run `RAGGED` too
    repeats: int = 3  # of each batch, after a warm-up
    peers: Sequence[str] = ()  # names in `subjects.PEERS`

    def __post_init__(self) -> None:
        for name, counts in (("--batch", self.batches), ("--prompt", self.prompts), ("--repeats", (self.repeats,))):
            for count in counts:
                check_count(name, count)
        if self.gen < 2:
            raise LlamaError(f"--gen is {self.gen}, expected at least 2: decoding begins with the second token")
        super().__post_init__()

    @property
    def all_batches(self) -> list[Batch]:
        """The batches to run, each once."""
        uniform = [Batch((prompt,) * bsz, self.gen) for prompt in self.prompts for bsz in self.batches]
        return list(dict.fromkeys([*uniform, RAGGED] if self.ragged else uniform))

    def build(self, place: Place) -> Llama:
        """The model to measure, with room for every batch. Raises LlamaError if it can't be loaded or doesn't fit."""
        max_seq_len = max(max(batch.lengths) + batch.gen for batch in self.all_batches)
        max_batch_size = max(len(batch.lengths) for batch in self.all_batches)
        return self.build_llama(place, max_seq_len, max_batch_size, PREFILL_CHUNK)


def parse_counts(option: str, text: str) -> list[int]:
    """The whole numbers in an option such as 1,8. Raises LlamaError for anything else."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise LlamaError(
            f"{option} is {shorten(text)}, expected whole numbers with commas between, such as 1,8"
        ) from None


def find_shape(name: str) -> ModelArgs:
    """The sizes of a model by its name. Raises LlamaError for an unknown name."""
    if name == DEMO_SHAPE:
        return survey(demo_checkpoint()).sizes
    if name not in SHAPES:
        raise LlamaError(f"--shape is {shorten(name)}, expected one of {', '.join([*SHAPES, DEMO_SHAPE])}")
    return SHAPES[name]


def build_random_llama(
    args: ModelArgs, place: Place, compile: bool, quantization: Quantization | None, prefill_chunk: int
) -> Llama:
    """A Llama of these sizes with random weights and a tokenizer without text."""
    accelerator = Accelerator(Acceleration(quantization, compile))
    model = build_random_model(args, place, accelerator.pack_weight)
    accelerator.finish(model)
    return Llama(model, NoText(), prefill_chunk=prefill_chunk)


def find_quantization(model: Transformer) -> Quantization | None:
    """How a model's matrices are quantized, whether in the checkpoint or while loading."""
    matrices = model.fast.packed_matrices if isinstance(model.fast, FastModel) else []
    bits = {matrix.bits for matrix in matrices if isinstance(matrix, QuantizedMatrix)}
    return next((name for name in BITS if BITS[name] in bits), None)


def compute_cache_bytes(args: ModelArgs, mp_size: int, dtype: torch.dtype, batch: Batch) -> float:
    """Bytes of cached keys and values that a decoding step reads on one rank, on average over a run's steps."""
    per_position = 2 * max(args.kv_heads // mp_size, 1) * args.head_size * dtype.itemsize  # in one layer
    contexts = [length + batch.gen / 2 for length in batch.lengths]  # the mean of length + 1 to length + gen - 1
    window = args.sliding_window
    sliding = 0 if window is None else args.n_layers if args.sliding_layers is None else len(args.sliding_layers)
    in_window = sum(min(context, window or context) for context in contexts)
    return per_position * (sliding * in_window + (args.n_layers - sliding) * sum(contexts))


def run_benchmark(config: BenchConfig) -> BenchReport:
    """Measure on every rank. The report is each rank's own; that of rank 0 is the one to show.

    Raises LlamaError if the model or a peer can't be built, or doesn't fit in memory.
    """
    place = config.find_place()
    check_peers(config.peers, place)
    with PeakMemory() as peak:
        started = time.perf_counter()
        ours = LlamaSubject("llama", config.build(place))
        ready_seconds = time.perf_counter() - started
        warm_up(ours, config.all_batches, ours.llama.model.params.vocab_size)
    device_peak = torch.cuda.max_memory_allocated(place.device) if place.device.type == "cuda" else None
    args = ours.llama.model.params
    place = replace(place, dtype=ours.llama.model.dtype)
    quantization = find_quantization(ours.llama.model)
    peers = build_peers(config.peers, ours.llama.model, place, config.ckpt_dir, quantization, config.adapter_dir)
    for peer in peers:
        warm_up(peer, config.all_batches, args.vocab_size)
    figures, ratios = compare_subjects([ours, *peers], config, args, place)
    return BenchReport(
        **describe_run(config, ours.llama.model, place, config.repeats),
        ready_seconds=ready_seconds,
        peak_private=peak.private,
        peak_resident=peak.resident,
        peak_device=device_peak,
        figures=figures,
        ratios=ratios,
    )


def describe_run(config: ModelConfig, model: Transformer, place: Place, repeats: int) -> dict[str, Any]:
    """The fields of `ReportHead`."""
    return {
        "model": config.model,
        "random_weights": config.ckpt_dir is None,
        "parameters": sum(part_sizes(model.params, 1).values()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "compile": config.compile,
        "quantization": find_quantization(model),
        "device": place.device.type,
        "processor": find_processor_name(place.device),
        "ranks": place.world_size,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "repeats": repeats,
    }


def warm_up(subject: ModelSubject, batches: Sequence[Batch], vocab_size: int) -> None:
    """Run every batch once."""
    for batch in batches:
        TimedRun(subject, batch.prompts(vocab_size), batch.gen).advance()


def compare_subjects(
    subjects: Sequence[ModelSubject], config: BenchConfig, args: ModelArgs, place: Place
) -> tuple[list[SubjectFigures], list[PeerRatio]]:
    """The figures of all subjects on all batches, and the ratios of the first subject to the others."""
    meter = BandwidthMeter(place.device)
    figures: list[SubjectFigures] = []
    ratios: list[PeerRatio] = []
    for batch in config.all_batches:
        # On a GPU a subject's next step would run during others' turns, so there every subject has one turn.
        steps_per_turn = STEPS_PER_TURN if place.device.type == "cpu" else batch.gen
        prompts = batch.prompts(args.vocab_size)
        runs = time_interleaved(subjects, prompts, batch.gen, config.repeats, meter, steps_per_turn)
        cache_bytes = compute_cache_bytes(args, place.mp_size, place.dtype, batch)
        for subject, subject_runs in zip(subjects, runs, strict=True):
            bytes_per_step = subject.weight_bytes + cache_bytes
            figures.append(SubjectFigures.from_runs(subject.name, batch, subject_runs, bytes_per_step))
        for peer, peer_runs in zip(subjects[1:], runs[1:], strict=True):
            ratios.append(PeerRatio.from_runs(peer.name, batch, runs[0], peer_runs))
    return figures, ratios


def find_processor_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpuinfo("model name") or platform.processor() or platform.machine()
