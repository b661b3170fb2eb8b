"""Checkpoints with quantized matrices: they load as what loading quantizes, on 1, 2 and 4 ranks, and say what
compressed-tensors' format says, by a decoder of its definition in numpy.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_program import OPTIONS, all_quantized, check_same, same_quantized
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from tiny import ARGS, write_checkpoint
from torch import Tensor

from llama import Llama, LlamaError
from llama.accelerate.quantization import BITS, GROUP, QuantizedMatrix, bits_of
from llama.bench.runner import find_quantization
from llama.checkpoints.convert import convert
from llama.checkpoints.huggingface import SINGLE
from llama.checkpoints.inspect import report_on
from llama.checkpoints.loader import load_model, open_checkpoint, survey
from llama.checkpoints.schema import tensor_shapes
from llama.cli.commands import parse
from llama.parallel import Place

QUANTIZATIONS = ["int8", "int4"]
SIZES = replace(ARGS, dim=128, n_heads=8, n_kv_heads=4, head_dim=32, multiple_of=256)  # 4 x 64 columns of wo, and of w2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), SIZES)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("tied"), SIZES)
    tensors = torch.load(directory / "consolidated.00.pth", weights_only=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    torch.save(tensors, directory / "consolidated.00.pth")
    return directory


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantization(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stored(source: Path, quantization: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored") / quantization
    convert(source, directory, "hf", quantization=quantization)  # type: ignore[arg-type]
    return directory


@pytest.fixture
def altered(stored: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the stored checkpoint with other tensors, or another quantization_config."""

    def altered(
        tensors: Callable[[dict], object] | None = None, config: Callable[[dict], object] | None = None
    ) -> Path:
        for path in stored.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        if tensors is not None:
            found = load_file(tmp_path / SINGLE)
            tensors(found)
            save_file(found, tmp_path / SINGLE)
        if config is not None:
            values = json.loads((tmp_path / "config.json").read_text())
            config(values["quantization_config"])
            (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return altered


def decoded(tensors: dict[str, Tensor], name: str, bits: int) -> np.ndarray:
    """Dequantize as defined: integers from each word's lowest bits on, minus an offset, times the scale."""
    words = tensors[f"{name}.weight_packed"].numpy().view(np.uint32)
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    integers = np.stack([words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], -1).reshape(rows, columns)
    scales = tensors[f"{name}.weight_scale"].float().numpy()
    return (integers.astype(np.float32) - (1 << bits - 1)) * scales.repeat(columns // scales.shape[1], axis=1)


def test_what_is_stored_is_what_loading_rounds(source: Path, stored: Path, quantization: str) -> None:
    """All matrices are equal bit for bit, though rows of wq and wk have another order in the files."""
    loaded = Llama.build(stored, **OPTIONS)
    rounded = Llama.build(source, **OPTIONS, quantization=quantization)
    assert len(all_quantized(rounded)) == 7 * SIZES.n_layers + 1
    assert same_quantized(loaded, rounded)
    assert same_quantized(Llama.build(stored, **OPTIONS, quantization=quantization), rounded)
    assert find_quantization(loaded.model) == find_quantization(rounded.model) == quantization
    assert find_quantization(Llama.build(source, **OPTIONS).model) is None
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens), rounded.model(tokens))


def test_the_format_by_its_definition(source: Path, stored: Path, quantization: str) -> None:
    """Files have the format's tensors and no others, and each is near the original matrix."""
    bits, group = BITS[quantization], GROUP[BITS[quantization]]
    tensors = load_file(stored / SINGLE)
    convert(source, stored.parent / f"plain-{quantization}", "hf")
    plain = load_file(stored.parent / f"plain-{quantization}" / SINGLE)
    linear = [name.removesuffix(".weight") for name in plain if "_proj" in name or "lm_head" in name]
    assert len(linear) == 7 * SIZES.n_layers + 1
    parts = ("packed", "scale", "shape")
    assert tensors.keys() == plain.keys() - {f"{n}.weight" for n in linear} | {
        f"{n}.weight_{p}" for n in linear for p in parts
    }
    for name in linear:
        rows, columns = plain[f"{name}.weight"].shape
        found = [tensors[f"{name}.weight_{part}"] for part in parts]
        shapes = [(rows, columns * bits // 32), (rows, columns // group), (2,)]
        assert [tuple(tensor.shape) for tensor in found] == shapes
        assert [tensor.dtype for tensor in found] == [torch.int32, torch.bfloat16, torch.int64]
        apart = np.linalg.norm(decoded(tensors, name, bits) - plain[f"{name}.weight"].numpy())
        assert apart < {8: 0.01, 4: 0.1}[bits] * plain[f"{name}.weight"].norm()
    config = json.loads((stored / "config.json").read_text())["quantization_config"]
    (scheme,) = config["config_groups"].values()
    assert (config["quant_method"], config["format"], config["ignore"]) == ("compressed-tensors", "pack-quantized", [])
    expected = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    assert scheme["targets"] == ["Linear"] and scheme["weights"].items() >= expected.items()


def test_back_to_numbers(stored: Path, quantization: str, tmp_path: Path, place: Place) -> None:
    """Conversion without --quantization and loading without a fast form give the numbers of the definition."""
    tensors = load_file(stored / SINGLE)
    convert(stored, tmp_path / "meta", "meta", 2)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    convert(stored, tmp_path / "direct", "hf")
    plain = load_file(tmp_path / "hf" / SINGLE)
    assert (tmp_path / "direct" / SINGLE).read_bytes() == (tmp_path / "hf" / SINGLE).read_bytes()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("meta", "hf", "direct")]
    assert not any("quantization_config" in config for config in configs)
    for name in plain:
        stem = name.removesuffix(".weight")
        rounded = f"{stem}.weight_packed" in tensors
        expected = torch.from_numpy(decoded(tensors, stem, BITS[quantization])) if rounded else tensors[name]
        assert torch.equal(plain[name], expected), name
    checkpoint, back = open_checkpoint(stored), open_checkpoint(tmp_path / "hf")
    models = [load_model(c, c.sizes, place).state_dict() for c in (checkpoint, back)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


def test_a_tied_embedding_stays_and_is_rounded_by_loading(tied: Path, quantization: str, tmp_path: Path) -> None:
    convert(tied, tmp_path / "stored", "hf", quantization=quantization)  # type: ignore[arg-type]
    tensors = load_file(tmp_path / "stored" / SINGLE)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert not any(name.startswith("lm_head") for name in tensors)
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    loaded = Llama.build(tmp_path / "stored", **OPTIONS)
    rounded = Llama.build(tied, **OPTIONS, quantization=quantization)
    assert same_quantized(loaded, rounded) and "output" in all_quantized(loaded)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens), rounded.model(tokens))


def test_dtype_is_that_of_the_numbers_that_are_rounded(
    source: Path, stored: Path, quantization: str, tmp_path: Path
) -> None:
    convert(source, tmp_path / "half", "hf", dtype=torch.bfloat16, quantization=quantization)  # type: ignore[arg-type]
    options = {**OPTIONS, "dtype": "bfloat16"}
    loaded = Llama.build(tmp_path / "half", **{**options, "dtype": "auto"})
    assert loaded.model.norm.weight.dtype == torch.bfloat16
    assert same_quantized(loaded, Llama.build(source, **options, quantization=quantization))
    assert not same_quantized(loaded, Llama.build(stored, **options))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_of_ranks(source: Path, stored: Path, quantization: str, ranks: int) -> None:
    """Every rank gets the part that it would have quantized itself."""
    plain, rounded = open_checkpoint(source), open_checkpoint(stored)
    for name in filter(rounded.is_quantized, tensor_shapes(SIZES)):
        for rank in range(ranks):
            found = rounded.quantized_part(name, rank, ranks, torch.float32).by_rows()
            expected = QuantizedMatrix(plain.part(name, rank, ranks), BITS[quantization]).by_rows()
            assert torch.equal(found.words, expected.words) and torch.equal(found.scales, expected.scales)


def test_ranks(pool: RankPool, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "stored", "hf", quantization="int4")
    pool.run(check_same, str(source), str(tmp_path / "stored"), "int4", ranks=2)


def test_groups_are_not_divided(quantization: str, tmp_path: Path) -> None:
    group = GROUP[BITS[quantization]]
    sizes = replace(SIZES, dim=256, head_dim=group // 4)  # 2 groups in a row of wo
    source = write_checkpoint(tmp_path / "source", sizes)
    convert(source, tmp_path / "stored", "hf", quantization=quantization)  # type: ignore[arg-type]
    report = report_on(survey(tmp_path / "stored"), mp_size=4)
    assert report.mp_sizes == [1, 2]
    assert any(
        f"quantized in groups of {group}): start with torchrun --nproc_per_node 1 or 2" in p for p in report.problems
    )
    with pytest.raises(LlamaError, match="can be divided over 1, 2 ranks"):
        convert(tmp_path / "stored", tmp_path / "meta", "meta", 4)
    assert report_on(survey(source), mp_size=4).mp_sizes == [1, 2, 4, 8]


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(LlamaError) as error:
        convert(*arguments, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_what_is_not_stored_so(source: Path, stored: Path, quantization: str, tmp_path: Path) -> None:
    target, other = tmp_path / "x", {"int8": "int4", "int4": "int8"}[quantization]
    assert "use --to hf (to='hf'), or leave out quantization" in refusal(
        source, target, "meta", quantization=quantization
    )
    assert "expected None or one of int8, int4" in refusal(source, target, "hf", quantization="int3")
    for asked in QUANTIZATIONS:
        assert f"quantized to {quantization} already" in refusal(stored, target, "hf", quantization=asked)
    odd = write_checkpoint(tmp_path / "odd", replace(SIZES, dim=80, n_heads=4))
    assert "rows of 80, but" in refusal(odd, target, "hf", quantization=quantization)
    assert not target.exists()
    with pytest.raises(LlamaError, match=f"quantized to {quantization}, but quantization is '{other}': leave it out"):
        Llama.build(stored, **OPTIONS, quantization=other)


QUERIES = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "no scale": (lambda t: t.pop(f"{QUERIES}_scale"), f"missing {QUERIES}_scale"),
    "no words": (lambda t: t.pop(f"{QUERIES}_packed"), f"missing {QUERIES}_packed"),
    "no shape": (lambda t: t.pop(f"{QUERIES}_shape"), f"missing {QUERIES}_shape"),
    "another shape": (
        lambda t: t.update({f"{QUERIES}_shape": torch.tensor([256, 64])}),
        f"{QUERIES}_shape is (256, 64), expected (256, 128)",
    ),
    "fewer words": (
        lambda t: t.update({f"{QUERIES}_packed": t[f"{QUERIES}_packed"][:, 1:].contiguous()}),
        f"{QUERIES}_packed of shape (256,",
    ),
    "scales of another dtype": (
        lambda t: t.update({f"{QUERIES}_scale": t[f"{QUERIES}_scale"].half()}),
        f"{QUERIES}_scale of torch.float16, expected bfloat16",
    ),
    "an order of columns": (
        lambda t: t.update({f"{QUERIES}_g_idx": torch.zeros(128, dtype=torch.int32)}),
        f"surplus {QUERIES}_g_idx",
    ),
    "the matrix itself": (lambda t: t.update({QUERIES: torch.zeros(256, 128)}), f"surplus {QUERIES}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(altered: Callable[..., Path], damage: str) -> None:
    change, expected = DAMAGES[damage]
    directory = altered(change)
    report = report_on(survey(directory))
    assert any(line.startswith(expected) for line in report.misfits), report.misfits
    with pytest.raises(LlamaError) as error:
        Llama.build(directory, **OPTIONS)
    assert expected in str(error.value)


def weights(config: dict) -> dict:
    return config["config_groups"]["group_0"]["weights"]


OTHERS: dict[str, tuple[Callable[[dict], object], str]] = {
    "method": (lambda c: c.update(quant_method="gptq"), "quant_method 'gptq', expected 'compressed-tensors'"),
    "format": (lambda c: c.update(format="int-quantized"), "format 'int-quantized', expected 'pack-quantized'"),
    "group": (lambda c: weights(c).update(group_size=128), "weights group_size 128, expected "),
    "strategy": (lambda c: weights(c).update(strategy="channel"), "weights strategy 'channel', expected 'group'"),
    "zero points": (lambda c: weights(c).update(symmetric=False), "weights symmetric False, expected True"),
    "floats": (lambda c: weights(c).update(type="float"), "weights type 'float', expected 'int'"),
    "fewer layers": (lambda c: c.update(ignore=["lm_head"]), "ignore ['lm_head'], expected None"),
    "activations": (
        lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "input_activations {'num_bits': 8}, expected None",
    ),
    "two groups": (lambda c: c["config_groups"].update(group_1={}), "config_groups {"),
    "no group": (lambda c: c.pop("config_groups"), "config_groups None"),
    "a turn": (lambda c: c.update(transform_config={"config_groups": {}}), "transform_config {"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_roundings_are_refused(altered: Callable[..., Path], other: str) -> None:
    change, expected = OTHERS[other]
    directory = altered(config=change)
    with pytest.raises(LlamaError, match="the weights are quantized") as error:
        open_checkpoint(directory)
    assert expected in str(error.value)


def test_what_changes_no_number_may_differ(altered: Callable[..., Path]) -> None:
    def change(config: dict) -> None:
        config.update(quantization_status="frozen", version="0.12", kv_cache_scheme=None, sparsity_config={})
        config["config_groups"]["group_0"].update(format="pack-quantized", input_activations=None)
        weights(config).update(observer="mse", observer_kwargs={"a": 1}, block_structure=None)

    assert open_checkpoint(altered(config=change)).quantization is not None


def test_inspect_tells_of_it(source: Path, stored: Path, quantization: str) -> None:
    report, plain = report_on(survey(stored)), report_on(survey(source))
    fitting = [1, 2, 4] if quantization == "int8" else [1, 2, 4, 8]
    assert report.ok and report.quantization == quantization and plain.quantization is None
    assert (report.parameters, report.sizes, report.mp_sizes) == (plain.parameters, plain.sizes, fitting)
    assert f"quantized    {quantization}: integers of {BITS[quantization]} bits" in report.as_text()
    assert "quantized" not in plain.as_text()
    rounded = report.parameters - SIZES.vocab_size * SIZES.dim - (2 * SIZES.n_layers + 1) * SIZES.dim
    kept = report.parameters - rounded
    assert report.memory is not None and report.memory.dtype == "float32"
    assert report.memory.weights == pytest.approx(4 * kept + rounded * bits_of(quantization) / 8, abs=8)


def test_memory_is_checked_by_what_it_takes(
    stored: Path, source: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = report_on(survey(stored), max_seq_len=64).memory
    assert memory is not None
    monkeypatch.setattr("llama.checkpoints.fit.available_memory", lambda device: memory.weights + memory.kv_cache)
    Llama.build(stored, **OPTIONS)
    with pytest.raises(LlamaError, match="do not fit"):
        Llama.build(source, **OPTIONS)
    monkeypatch.setattr("llama.checkpoints.fit.available_memory", lambda device: memory.weights + memory.kv_cache - 1)
    with pytest.raises(LlamaError, match="do not fit"):
        Llama.build(stored, **OPTIONS)


def test_over_several_files(
    source: Path, stored: Path, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are filled by the sizes of quantized matrices."""
    whole = load_file(stored / SINGLE)
    for single in (True, False):
        room = sum(tensor.nbytes for tensor in whole.values()) // (1 if single else 3)
        monkeypatch.setattr("llama.checkpoints.huggingface.FILE_BYTES", room)
        convert(source, tmp_path / "out", "hf", force=True, quantization=quantization)  # type: ignore[arg-type]
        files = list((tmp_path / "out").glob("*.safetensors"))
        assert (len(files) == 1) == single
        found = {name: tensor for path in files for name, tensor in load_file(path).items()}
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
        assert open_checkpoint(tmp_path / "out").quantization == quantization


def test_the_command(
    source: Path, stored: Path, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["llama", "convert", str(source), str(tmp_path / "out"), "--to", "hf", "--quantization", quantization]
    monkeypatch.setattr(sys, "argv", command)
    options = parse()
    options.run(options)
    assert (tmp_path / "out" / SINGLE).read_bytes() == (stored / SINGLE).read_bytes()
