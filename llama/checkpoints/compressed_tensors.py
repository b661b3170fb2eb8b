"""Quantized matrices in files, as `convert --quantization` writes them: "pack-quantized" of the format
compressed-tensors (github.com/vllm-project/compressed-tensors), which transformers and vLLM read too.

Three tensors stand for a linear layer's `weight` (N, K): `weight_packed` and `weight_scale`, which are the words and
scales of `QuantizedRows`, and `weight_shape`, the numbers N and K. The embedding is no linear layer and stays as
it is; where the output layer is the same matrix, it is quantized on loading. Knows tensors and configurations; opens no
file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._util.device import DTYPES
from ..accelerate.quantization import BITS, GROUP, Quantization, QuantizedMatrix, slabs
from ..errors import LlamaError, shorten
from ..model import ModelArgs
from .schema import New, Shapes, Stored, is_linear, tensor_shapes

WORDS, SCALES, SHAPE = "_packed", "_scale", "_shape"  # suffixes to the name of the tensor that they stand for
IGNORED_KEYS = {"quantization_status", "global_compression_ratio", "version"}  # of the configuration: change no number
# Defaults of the keys of a group's `weights`. Its other keys only say how the scales were computed.
WEIGHT_KEYS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": None, "group_size": None, "dynamic": False}
WEIGHT_KEYS |= {"actorder": None}


def file_shapes(args: ModelArgs, quantization: Quantization | None) -> Shapes:
    """As `tensor_shapes`, of the tensors in files."""
    shapes: Shapes = {}
    for name, shape in tensor_shapes(args).items():
        if quantization is None or not is_linear(name):
            shapes[name] = shape
            continue
        rows, columns = shape
        bits = BITS[quantization]
        shapes[name + WORDS] = (rows, columns * bits // 32)
        shapes[name + SCALES] = (rows, columns // GROUP[bits])
        shapes[name + SHAPE] = (2,)
    return shapes


def file_dtypes(name: str) -> list[torch.dtype]:
    """The dtypes that the tensor may have in files."""
    dtypes = {WORDS: torch.int32, SCALES: torch.bfloat16, SHAPE: torch.int64}
    return next(([dtype] for end, dtype in dtypes.items() if name.endswith(end)), list(dict.fromkeys(DTYPES.values())))


def find_wrong_shapes(tensors: Mapping[str, Stored], args: ModelArgs) -> list[str]:
    """The quantized matrices whose `weight_shape` is wrong."""
    problems = []
    for name, shape in tensor_shapes(args).items():
        stored = tensors.get(name + SHAPE)
        if stored is not None and stored.shape == (2,) and (actual := tuple(stored.read().tolist())) != shape:
            problems.append(f"{stored.name} is {actual}, expected {shape}")
    return problems


def quantize_tensor(
    weight: Tensor, name: str, quantization: Quantization, dtype: torch.dtype, new: New
) -> dict[str, Tensor]:
    """The three tensors that stand for W (N, K), quantized from numbers of this dtype, a few rows at a time.

    new: makes the tensors of the result.
    """
    (rows, columns), bits = weight.shape, BITS[quantization]
    words = new((rows, columns * bits // 32), torch.int32)
    scales = new((rows, columns // GROUP[bits]), torch.bfloat16)
    for start, piece in slabs(weight, from_file=True):
        quantized = QuantizedMatrix(piece.to(dtype), bits).by_rows()
        words[start : start + len(piece)], scales[start : start + len(piece)] = quantized.words, quantized.scales
    return {name + WORDS: words, name + SCALES: scales, name + SHAPE: torch.tensor([rows, columns])}


def check_groups(args: ModelArgs, quantization: Quantization | None) -> None:
    """Raise LlamaError for a model whose rows aren't whole groups: the format can't hold it."""
    if quantization is None:
        return
    group = GROUP[BITS[quantization]]
    for name, shape in tensor_shapes(args).items():
        if is_linear(name) and shape[1] % group:
            raise LlamaError(
                f"{name} has rows of {shape[1]}, but {quantization} is stored in groups of {group}: convert without "
                f"quantization, and build with quantization={quantization!r} (--quantization {quantization}), which "
                "quantizes any rows"
            )


# --- the configuration ----------------------------------------------------------------------------------------------


def quantization_config(quantization: Quantization, tied: bool) -> dict[str, Any]:
    """The `quantization_config` of a model's `config.json`. tied: whether the output layer is the embedding."""
    weights = {**WEIGHT_KEYS, "num_bits": BITS[quantization], "strategy": "group"}
    weights["group_size"] = GROUP[BITS[quantization]]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"] if tied else [],
    }


def normalize_config(config: dict[str, Any]) -> dict[str, Any]:
    """What a `quantization_config` says of the numbers, in one flat dict; empty and ignored keys are left out."""
    flat = {key: value for key, value in config.items() if value and key not in {"config_groups", *IGNORED_KEYS}}
    groups = config.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        return flat | {"config_groups": groups}
    flat["config_groups"] = "one that has weights"
    flat |= {f"weights {key}": weights.get(key, default) for key, default in WEIGHT_KEYS.items()}
    repeated = {"weights": weights, "format": flat.get("format")}
    return flat | {key: value for key, value in group.items() if value and value != repeated.get(key)}


def quantization_of(config: Any, tied: bool, path: Path) -> Quantization | None:
    """The quantization that a `quantization_config` describes; None for None.

    tied: whether the output layer is the embedding. path: where the configuration came from, for messages.
    Raises LlamaError for another configuration than `convert` writes, naming a key in which it differs.
    """
    if config is None:
        return None
    actual = normalize_config(config) if isinstance(config, dict) else {"quantization_config": config}
    differing: list[tuple[Any, Any, Any]] = []
    for name in BITS:
        expected = normalize_config(quantization_config(name, tied))
        keys = [key for key in {**expected, **actual} if actual.get(key) != expected.get(key)]
        if not keys:
            return name
        if not differing or len(keys) < len(differing):
            differing = [(key, actual.get(key), expected.get(key)) for key in keys]
    key, value, expected_value = differing[0]
    raise LlamaError(
        f"{path}: the weights are quantized, and quantization_config has {key} {shorten(value)}, expected "
        f"{shorten(expected_value)}; the only quantized files that are read are those that convert writes with "
        f"quantization ({' or '.join(BITS)}): compressed-tensors, pack-quantized, symmetric groups. Use the checkpoint "
        "that it was made of"
    )
