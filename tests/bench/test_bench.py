"""The benchmark: bytes are compared with counts by hand, subjects' tokens with the model's own; and the command.

No test asserts a speed, which depends on the machine.
"""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from conftest import CASES, Twin, assert_close
from tiny import run_program
from torch import Tensor

from llama import Llama, LlamaError, ModelArgs
from llama.accelerate.quantization import Quantization
from llama.bench.llama_cpp import LlamaCppSubject, check_architecture, write_gguf
from llama.bench.measure import RAGGED, BandwidthMeter, Batch, PeakMemory, Run, Spread, time_interleaved
from llama.bench.plots import Chart
from llama.bench.report import TABLE_HEADER, BenchReport, PeerRatio, SubjectFigures
from llama.bench.runner import SHAPES, BenchConfig, compute_cache_bytes, find_shape
from llama.bench.subjects import (
    LlamaSubject,
    MetaSubject,
    NoText,
    TransformersSubject,
    build_peers,
    build_random_model,
    check_peers,
)
from llama.checkpoints.schema import is_multiplied, part_sizes, tensor_shapes
from llama.parallel import Place
from llama.rotary import RopeScaling

SMALL = ["--device", "cpu", "--dtype", "float32", "--shape", "demo", "--gen", "4"]
SPREADS = ["first_seconds", "prefill_rate", "decode_rate", "total_seconds", "read_rate", "bandwidth", "share"]

Command = Callable[..., tuple[str, str]]


@pytest.fixture
def bench(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `python -m llama bench ...` in this process: (standard output, standard error)."""
    monkeypatch.setattr("llama.bench.runner.RAGGED", Batch((3, 9, 5, 12), 4))
    monkeypatch.setattr("llama.bench.measure.METER_BYTES", 1 << 20)

    def run(*options: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["llama", "bench", *options])
        try:
            runpy.run_module("llama", run_name="__main__")
        except SystemExit as e:
            assert e.code == 1
        return capsys.readouterr()

    return run


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_of_weights_are_those_by_hand(place: Place, tied: bool) -> None:
    args = ModelArgs(64, 3, 8, 2, 96, 32, max_batch_size=2, max_seq_len=8, tied_embeddings=tied)
    model = build_random_model(args, place)
    q, kv, hidden = 64 * 64, 16 * 64, 192 * 64  # hidden_dim: 2/3 of 256, rounded up to 32s
    layer = 2 * q + 2 * kv + 3 * hidden + 2 * 64
    by_hand = 4 * (3 * layer + 64 + 96 * 64)  # the last is the output, tied or not
    streaming = LlamaSubject("ours", Llama(model, NoText()))
    assert streaming.weight_bytes == by_hand
    list(streaming.run([[1, 2]], 2))  # which makes the caches
    assert streaming.weight_bytes == by_hand
    (theirs,) = build_peers(["transformers"], model, place, None)
    assert by_hand <= theirs.weight_bytes <= by_hand + 1000, "with its table of angles"
    assert theirs.model.num_parameters() == sum(part_sizes(args, 1).values())  # type: ignore[attr-defined]


def test_the_bytes_of_the_cache_are_those_by_hand() -> None:
    args = ModelArgs(64, 6, 8, 2, 96, 32)
    steps = [10 + step for step in range(1, 32)]  # positions that each of the 31 steps after the first token sees
    keys_and_values = 2 * 6 * 2 * 8 * 2  # both, layers, heads, head_dim, bytes
    mean = sum(steps) / len(steps)
    assert compute_cache_bytes(args, 1, torch.bfloat16, Batch((10, 10), 32)) == 2 * mean * keys_and_values
    assert compute_cache_bytes(args, 2, torch.bfloat16, Batch((10,), 32)) == mean * keys_and_values / 2
    assert compute_cache_bytes(args, 4, torch.bfloat16, Batch((10,), 32)) == mean * keys_and_values / 2, (
        "ranks share a head"
    )
    windowed = replace(args, sliding_window=16, sliding_layers=(1, 4, 5))
    assert compute_cache_bytes(windowed, 1, torch.bfloat16, Batch((10,), 32)) == (mean + 16) / 2 * keys_and_values
    everywhere = replace(args, sliding_window=16)
    assert compute_cache_bytes(everywhere, 1, torch.bfloat16, Batch((10,), 32)) == 16 * keys_and_values


def test_the_shapes_are_the_published_ones() -> None:
    published = {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248, "demo": 5_999_872}
    assert {name: sum(part_sizes(find_shape(name), 1).values()) for name in [*SHAPES, "demo"]} == published


def test_figures_of_given_moments() -> None:
    steady = Run([2.0, 2.5, 3.0, 9.0, 9.5], 1000.0)  # one step was interrupted
    slower = Run([4.0, 5.0, 6.0, 7.0, 8.0], 800.0)
    batch = Batch((6, 6, 6), 5)
    figures = SubjectFigures.from_runs("x", batch, [steady, slower], bytes_per_step=300)
    assert (figures.batch, figures.rows, figures.prompt, figures.gen) == ("3 x 6", 3, 6, 5)
    assert figures.first_seconds == Spread(3, 2, 4)
    assert figures.prefill_rate == Spread(6.75, 4.5, 9)
    assert figures.decode_rate == Spread(4.5, 3, 6)
    assert figures.total_seconds == Spread(8.75, 8, 9.5)
    assert figures.bytes_per_token == 100
    assert figures.read_rate == Spread(450, 300, 600)
    assert figures.bandwidth == Spread(900, 800, 1000)
    assert figures.share == Spread((0.6 + 0.375) / 2, 0.375, 0.6)
    ratio = PeerRatio.from_runs("y", batch, [steady, steady], [slower, steady])
    assert (ratio.prefill, ratio.decode) == (Spread(1.5, 1, 2), Spread(1.5, 1, 2))
    assert ratio.total.max == 1 and ratio.total.min == 8 / 9.5
    assert SubjectFigures.from_runs("x", RAGGED, [steady], 300).prompt is None


def test_subjects_take_turns_on_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of others' turns and of the meter isn't counted."""
    heard, clock = [], [0.0]

    class Subject:
        def __init__(self, name: str):
            self.name = name

        def run(self, prompts: list[list[int]], gen: int) -> Any:
            for _ in range(gen):
                heard.append((self.name, str(prompts)))
                clock[0] += 1
                yield [0]

    class Meter(BandwidthMeter):
        def measure(self) -> float:
            clock[0] += 100
            return clock[0]

    prompts = Batch((3, 2), 6).prompts(9)
    monkeypatch.setattr("llama.bench.measure.time.perf_counter", lambda: clock[0])
    runs = time_interleaved([Subject("a"), Subject("b")], prompts, 6, 2, Meter(torch.device("cpu")), steps_per_turn=3)
    assert "".join(name for name, _ in heard) == "ab" + "aaabbb" + "aabb" + "ab" + "aaabbb" + "aabb"
    assert len({said for _, said in heard}) == 1
    for own in runs:
        assert [run.token_seconds for run in own] == 2 * [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    # The first meets the meter after both prefills at 302, after its next 3 steps at 405, then at 508 and 610.
    assert runs[0][0].bandwidth == ((302 + 405) / 2 + (508 + 610) / 2) / 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what of its memory is private")
def test_the_peak_is_what_was_held_and_not_what_is() -> None:
    with PeakMemory() as idle:
        pass
    with PeakMemory() as peak:
        held = torch.ones(25_000_000)
        del held
    assert 90e6 < peak.private - idle.private < 300e6  # type: ignore[operator]
    assert peak.resident >= peak.private  # type: ignore[operator]


# --- peers ------------------------------------------------------------------------------------------------------------


def test_all_subjects_make_the_models_own_tokens(grouped: Twin) -> None:
    """Those that transformers computes without any cache, on the same weights."""
    prompts = [grouped.tokens(length, seed=length).tolist() for length in (4, 11, 7)]
    expected = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(6):
            row.append(int(grouped.expected(torch.tensor([row]))[0, -1].argmax()))
        expected.append(row[len(prompt) :])
    steps = [list(step) for step in zip(*expected, strict=True)]
    ours = replace(CASES["grouped"])
    assert grouped.ours.params == ours
    assert list(LlamaSubject("ours", Llama(grouped.ours, NoText())).run(prompts, 6)) == steps
    assert list(TransformersSubject(grouped.theirs).run(prompts, 6)) == steps
    walked = list(MetaSubject(grouped.ours).run(prompts, 6))
    assert [step[1] for step in walked] == expected[1], "it yields from the longest prompt's first token on"
    alone = list(MetaSubject(grouped.ours).run(prompts[2:], 6))
    assert alone == [[token] for token in expected[2]]


def in_file_order(args: ModelArgs, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the order of the file, without the output layer if it is tied to the embedding."""
    return ((name, weights[name]) for name in tensor_shapes(args))


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True},
        {"head_dim": 32},
        {"rope_scaling": RopeScaling("llama3", 8, original_max_position_embeddings=16)},
        {"rope_scaling": RopeScaling("linear", 4)},
    ],
    ids=["plain", "tied", "wide heads", "llama3", "linear"],
)
def test_llama_cpp_makes_the_models_own_logits_and_tokens(place: Place, changes: dict[str, Any]) -> None:
    """Rows of different lengths are prefilled and decoded together; in float32, so that the comparison is strict."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python isn't here")
    args = replace(CASES["grouped"], max_seq_len=64, **changes)
    model = build_random_model(args, place)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():  # those of the benchmark are so small that all tokens look alike
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if noise.ndim == 1 else 2 * noise / noise.shape[1] ** 0.5
    peer = LlamaCppSubject(args, torch.float32, None, in_file_order(args, model.state_dict()))
    streaming = LlamaSubject("plain", Llama(model, NoText()))
    assert peer.weight_bytes == streaming.weight_bytes + 4 * (args.head_size // 2) * (args.rope_scaling is not None)
    prompts = [list(range(3, 3 + length)) for length in (1, 17, 6, 30)]
    with torch.inference_mode():
        for row, logits in zip(prompts, peer.compute_logits(prompts, [0] * 4), strict=True):
            assert_close(torch.from_numpy(logits), model(torch.tensor([row]), 0)[0, -1], share=1e-5)
    steps = list(streaming.run(prompts, 20))
    assert list(peer.run(prompts, 20)) == steps
    assert list(peer.run(prompts[1:], 20)) == [step[1:] for step in steps], "nothing is left of an earlier run"


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("dtype", "quantization", "share", "bits"),
    [
        (torch.bfloat16, None, 0.05, 16),
        (torch.float16, None, 0.01, 16),
        (torch.bfloat16, "int8", 0.05, 8.5),
        (torch.bfloat16, "int4", 0.4, 4.5),
    ],
)
def test_llama_cpp_computes_the_model_in_shorter_numbers(
    place: Place, dtype: torch.dtype, quantization: Quantization | None, share: float, bits: float
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python isn't here")
    args = ModelArgs(128, 2, 8, 2, 96, 32, max_batch_size=2, max_seq_len=32, tied_embeddings=True)
    model = build_random_model(args, place)
    peer = LlamaCppSubject(args, dtype, quantization, in_file_order(args, model.state_dict()))
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    matrices = sum(p.numel() for p in model.parameters()) - vectors
    assert peer.weight_bytes == matrices * bits / 8 + vectors * 4
    (logits,) = peer.compute_logits([[5, 3, 8, 60]], [0])
    with torch.inference_mode():
        assert_close(torch.from_numpy(logits), model(torch.tensor([[5, 3, 8, 60]]), 0)[0, -1], share)


@pytest.mark.llama_cpp
def test_the_command_compares_with_llama_cpp(bench: Command) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python isn't here")
    options = ["--device", "cpu", "--prompt", "8", "--gen", "4", "--repeats", "1", "--compare", "llama.cpp", "--ragged"]
    for more in (["--shape", "demo", "--quantization", "int8"], ["--ckpt_dir", "demo/model", "--dtype", "float32"]):
        said, error = bench(*options, *more)
        assert error == ""
        assert said.count("vs llama.cpp") == 2


@pytest.mark.parametrize(
    ("changes", "quantization", "message"),
    [
        ({"qkv_bias": True, "qk_norm": True}, None, "has biases, norms of queries and keys: leave it out"),
        ({"sliding_window": 8}, None, "has a sliding window"),
        ({"rope_scaling": RopeScaling("yarn", 4)}, None, "has rope scaling that depends on length"),
        ({}, "int4", "has rows that groups of 32 don't fill"),
    ],
)
def test_llama_cpp_is_for_plain_llama(changes: dict[str, Any], quantization: Quantization | None, message: str) -> None:
    check_architecture(ModelArgs(48, 2, 4), None)
    with pytest.raises(LlamaError, match=message):
        check_architecture(ModelArgs(48, 2, 4, **changes), quantization)


@pytest.mark.parametrize(
    ("dtype", "quantization", "step"),
    [
        (torch.float32, None, 0.0),
        (torch.bfloat16, None, 0.0),
        (torch.bfloat16, "int8", 0.5 / 127 + 2**-11),  # scales are float16
        (torch.bfloat16, "int4", 1 / 8),
    ],
)
def test_gguf_reads_the_file_for_llama_cpp(
    tmp_path: Path, place: Place, dtype: torch.dtype, quantization: Quantization | None, step: float
) -> None:
    """Sizes, and every number: as it is, or as far off as its group's scale allows, times the group's largest."""
    args = replace(CASES["grouped"], max_seq_len=64, rope_scaling=RopeScaling("linear", 4))
    weights = build_random_model(args, place).to(dtype).state_dict()
    size = write_gguf(tmp_path / "model.gguf", args, dtype, quantization, in_file_order(args, weights))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert size == sum(int(t.n_bytes) for t in reader.tensors if t.name != "token_embd.weight")
    sizes = {"block_count": args.n_layers, "embedding_length": args.dim, "attention.head_count_kv": args.kv_heads}
    for name, value in {**sizes, "rope.freq_base": args.rope_theta, "context_length": 64}.items():
        field = reader.get_field(f"llama.{name}")
        assert field is not None and field.contents() == pytest.approx(value)
    get_name = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers).get_name
    read = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    assert torch.equal(read.pop("rope_freqs.weight"), torch.full((args.head_size // 2,), 4.0))
    for name, weight in weights.items():
        numbers = read.pop(f"{get_name(name.removesuffix('.weight'))}.weight")
        groups = weight.float().unflatten(-1, (-1, 32)) if is_multiplied(name, args) else weight.float()[..., None]
        limit = step * groups.abs().amax(-1, keepdim=True) if is_multiplied(name, args) else 0.0
        assert ((numbers.view_as(groups) - groups).abs() <= limit).all(), name
    assert not read


def test_a_full_disk_is_told_before_llama_cpps_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(LlamaError, match=r"2\.47 GB are needed for llama\.cpp's file, and 0\.00 GB are free"):
        write_gguf(tmp_path / "model.gguf", SHAPES["1b"], torch.bfloat16, None, [])
    assert not list(tmp_path.iterdir())


def test_peers_that_are_unknown_missing_or_out_of_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    check_peers(["plain", "meta", "transformers"], place)
    for name in ("transformers", "llama.cpp"):
        with pytest.raises(LlamaError, match=f"{name} runs in one process, and 2 are here"):
            check_peers([name], replace(place, world_size=2))
    for module in ("transformers", "llama_cpp", "gguf"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LlamaError, match=r"pip install transformers$"):
        check_peers(["transformers"], place)
    with pytest.raises(LlamaError, match=r"pip install llama-cpp-python gguf$"):
        check_peers(["llama.cpp"], place)
    for module in ("llama_cpp", "gguf"):
        there = ModuleType(module)
        there.__spec__ = ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, module, there)
    check_peers(["llama.cpp"], place)
    with pytest.raises(LlamaError, match="on cuda: add --device cpu"):
        check_peers(["llama.cpp"], replace(place, device=torch.device("cuda")))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_report_has_every_field_and_they_agree(bench: Command) -> None:
    every = ["--ragged", "--compare", "transformers,default,plain,meta,products", "--repeats", "2", "--json"]
    said, error = bench(*SMALL, "--batch", "1,2", "--prompt", "8,16", *every)
    assert error == ""
    report = json.loads(said)
    assert report.keys() == {field.name for field in fields(BenchReport)}
    assert (report["model"], report["random_weights"], report["parameters"]) == ("demo", True, 5_999_872)
    assert (report["dtype"], report["device"], report["ranks"], report["repeats"]) == ("float32", "cpu", 1, 2)
    assert report["ready_seconds"] > 0
    if sys.platform == "linux":
        assert 4 * 5_999_872 < report["peak_private"] <= report["peak_resident"]
    batches = ["1 x 8", "2 x 8", "1 x 16", "2 x 16", "3+9+5+12"]
    subjects = ["llama", "transformers", "default", "plain", "meta", "products"]
    assert [(f["batch"], f["subject"]) for f in report["figures"]] == [(b, s) for b in batches for s in subjects]
    assert [(r["batch"], r["peer"]) for r in report["ratios"]] == [(b, s) for b in batches for s in subjects[1:]]
    for figures in report["figures"]:
        assert figures.keys() == {field.name for field in fields(SubjectFigures)}
        assert all(0 < figures[f]["min"] <= figures[f]["median"] <= figures[f]["max"] for f in SPREADS)
        assert figures["first_seconds"]["max"] < figures["total_seconds"]["max"]
        lengths = [int(n) for n in figures["batch"].split("+")] if figures["prompt"] is None else [figures["prompt"]]
        tokens = sum(lengths) * (figures["rows"] if figures["prompt"] else 1)
        assert figures["prefill_rate"]["max"] == pytest.approx(tokens / figures["first_seconds"]["min"])
        assert figures["read_rate"]["max"] == pytest.approx(figures["decode_rate"]["max"] * figures["bytes_per_token"])
        assert figures["share"]["max"] <= figures["read_rate"]["max"] / figures["bandwidth"]["min"]
    for ratio in report["ratios"]:
        assert all(0 < ratio[f]["min"] <= ratio[f]["median"] <= ratio[f]["max"] for f in ("prefill", "decode", "total"))


def test_one_repeat_ties_all_figures_together(bench: Command) -> None:
    report = json.loads(bench(*SMALL, "--prompt", "8", "--repeats", "1", "--compare", "plain", "--json")[0])
    ours, plain = report["figures"]
    (ratio,) = report["ratios"]
    assert ours["share"]["median"] == pytest.approx(ours["read_rate"]["median"] / ours["bandwidth"]["median"])
    assert ratio["decode"]["median"] == pytest.approx(ours["decode_rate"]["median"] / plain["decode_rate"]["median"])
    assert ratio["total"]["median"] == pytest.approx(plain["total_seconds"]["median"] / ours["total_seconds"]["median"])


def test_the_table_of_a_checkpoint(bench: Command) -> None:
    options = ["--ckpt_dir", "demo/model", "--device", "cpu", "--prompt", "8", "--gen", "4", "--compare", "plain,meta"]
    said, error = bench(*options)
    assert error == ""
    facts, _, table = said.partition("\n\n")
    assert [line.split()[0] for line in facts.splitlines()] == ["model", "machine", "loaded", "peak", "figures"]
    assert "demo/model, a checkpoint: 6 million parameters" in facts
    head, *rows = table.splitlines()
    assert all(name in head for name in TABLE_HEADER)
    assert [line.split("  ")[1].strip() for line in rows] == ["llama", "plain", "meta", "vs plain", "vs meta"]
    assert all(line.count("x (") == 3 for line in rows[3:])
    assert all("GB/s" not in line and line.endswith("%") for line in rows[:3])


@pytest.mark.slow
def test_on_two_ranks_each_reads_its_share_and_the_picture_shows_both(
    bench: Command, tmp_path: Path, place: Place
) -> None:
    options = [*SMALL, "--batch", "1,2", "--prompt", "8,16", "--repeats", "1", "--json"]
    done = run_program("-m", "llama", "bench", *options, "--compare", "plain", ranks=2)
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)
    assert both["ranks"] == 2
    assert {figures["subject"] for figures in both["figures"]} == {"llama", "plain"}
    (tmp_path / "two.json").write_text(done.stdout)
    picture = tmp_path / "speed.png"
    alone = json.loads(bench(*options, "--plot", str(picture), "--with", str(tmp_path / "two.json"))[0])
    norms = (2 * 6 + 1) * 256 * 4
    per_rank = alone["figures"][0]["bytes_per_token"] / 2 + norms / 2  # every rank has all norms, and half of the rest
    rounded_up = 1.05  # matrices are packed in blocks of 64 rows, and half of this model's has some that don't fill one
    assert per_rank <= both["figures"][0]["bytes_per_token"] < rounded_up * per_rank
    import matplotlib.image  # here, since it takes a second

    height, width, _ = matplotlib.image.imread(picture).shape
    assert height > 300 and width > 300
    points = Chart(str(picture), [str(tmp_path / "two.json")]).points
    assert {(p.ranks, p.rows, p.prompt, p.ours) for p in points} == {
        (2, rows, prompt, ours) for rows in (1, 2) for prompt in (8, 16) for ours in (True, False)
    }
    assert all(p.decode > 0 and p.prefill > 0 and p.limit > 0 for p in points)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "70x"], "--shape is '70x', expected one of 1b, 3b, 8b, demo"),
        (["--shape", "1b", "--ckpt_dir", "d"], "both --ckpt_dir and --shape were given"),
        (["--ckpt_dir", "/nowhere"], "ckpt_dir /nowhere: found nothing there"),
        (["--batch", "0"], "--batch is 0, expected a whole number of at least 1"),
        (["--prompt", "8,"], "--prompt is '8,', expected whole numbers with commas between"),
        (["--gen", "1"], "--gen is 1, expected at least 2"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--shape", "demo", "--prompt", "1000000000"], "max_seq_len=1000000064) in torch."),
        (
            ["--compare", "plain,vllm"],
            "--compare has 'vllm', expected one or more of transformers, default, plain, meta, products, llama.cpp",
        ),
        (["--device", "abacus"], "device 'abacus' is not known"),
        (["--plot", "speed.txt"], "--plot is 'speed.txt', expected the name of a file that ends in .png, .svg, .pdf"),
        (["--plot", "/nowhere/speed.png"], "there is no directory /nowhere: make it first"),
        (["--with", "a.json"], "--with was given without --plot"),
        (["--plot", "a.png", "--with", "nowhere.json"], "nowhere.json can't be read"),
        (["--plot", "a.png", "--with", "demo/model/params.json"], "isn't what `python -m llama bench --json` prints"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_measured(bench: Command, options: list[str], message: str) -> None:
    said, error = bench(*options)
    assert said == ""
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_a_missing_matplotlib_is_told(bench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = bench("--plot", "a.png")[1]
    assert error.startswith("error: --plot needs matplotlib, which is not installed: run ")
    assert error.endswith(" -m pip install matplotlib\n")


def test_a_config_runs_each_batch_once() -> None:
    config = BenchConfig(batches=[1, 2, 1], prompts=[3, 4], gen=5, ragged=True)
    assert [batch.name for batch in config.all_batches] == ["1 x 3", "2 x 3", "1 x 4", "2 x 4", "16+128+256+512"]


def test_the_profile_names_operations(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shape", "demo", "--device", "cpu", "--dtype", "float32", "--context", "8"]
    monkeypatch.setattr(sys, "argv", ["profile", *options])
    runpy.run_module("benchmarks.profile", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo, 1 x 8 tokens, torch.float32 on cpu"
    assert any(line.startswith(("kernels::product_float ", "aten::mm ", "aten::addmm ")) for line in lines)
    assert len(lines) == 2 + 20 + 1 + 2
    assert all("us for each of 6 layers" in line for line in lines[-2:])
