"""llama.cpp as a peer: weights are written to a GGUF file, which llama.cpp's own library reads and runs.

Knows GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and llama.cpp's C interface through the packages
`gguf` and `llama_cpp`, which are imported only when the peer is built; knows no clock and no checkpoint.
"""

import contextlib
import math
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accelerate.quantization import Quantization
from ..checkpoints.schema import is_multiplied, tensor_shapes
from ..errors import LlamaError
from ..model import ModelArgs
from ..rotary import frequencies
from .gguf_vocabulary import Vocabulary

GGUF_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
QUANTIZED_GGUF_TYPES: dict[Quantization, str] = {"int8": "Q8_0", "int4": "Q4_0"}
GROUP = 32  # numbers that share a scale, in both quantized types
STATIC_SCALINGS = ("linear", "llama3")  # rope scalings that don't depend on the length of the text
ROWS = 4096  # of a matrix that are quantized at a time
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR in ggml.h


class LlamaCppSubject:
    """llama.cpp on the CPU, with the settings of its own benchmark of batches.

    All rows go together in passes of 512 tokens, with flash attention, a cache of float16 that is divided between the
    rows, and logits of the last tokens only. If the weights are float32, so are cache and attention.
    """

    name = "llama.cpp"
    weight_bytes: int  # that a decoding step reads

    def __init__(
        self,
        args: ModelArgs,
        dtype: torch.dtype,
        quantization: Quantization | None,
        tensors: Iterable[tuple[str, Tensor]],
    ):
        """tensors: (name, tensor) in the order of `tensor_shapes`; one at a time is held.

        Raises LlamaError if the model isn't plain Llama, and if the disk has no room for the file.
        """
        import llama_cpp  # after torch, so that it shares torch's OpenMP

        check_architecture(args, quantization)
        log_errors_only()
        self._lib, self._vocab_size = llama_cpp, args.vocab_size
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            self.weight_bytes = write_gguf(path, args, dtype, quantization, tensors)
            self._model = self._load(path)
        self._context = self._create_context(args, dtype)
        self._batch = llama_cpp.llama_batch_init(args.max_batch_size * args.max_seq_len, 0, 1)
        weakref.finalize(self, llama_cpp.llama_model_free, self._model)  # runs last, since finalizers run backwards
        weakref.finalize(self, llama_cpp.llama_free, self._context)
        weakref.finalize(self, llama_cpp.llama_batch_free, self._batch)

    def _load(self, path: Path) -> Any:
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = self._lib.LLAMA_LOAD_MODE_NONE  # not mapped, so that the file can be removed
        model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if model is None:
            raise LlamaError("llama.cpp can't load the model, as it says above: leave it out of --compare")
        return model

    def _create_context(self, args: ModelArgs, dtype: torch.dtype) -> Any:
        """llama.cpp's context, with room for all rows."""
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = args.max_batch_size * args.max_seq_len
        params.n_seq_max, params.kv_unified = args.max_batch_size, False
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.op_offload = params.offload_kqv = False  # or a library that was built for GPUs would use them
        if dtype == torch.float32:  # flash attention would round to float16
            params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        else:
            params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = self._lib.llama_init_from_model(self._model, params)
        if context is None:
            raise LlamaError("llama.cpp can't run these batches, as it says above: leave it out of --compare")
        return context

    def run(self, prompts: list[list[int]], gen: int) -> Iterator[list[int]]:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        rows, starts = prompts, [0] * len(prompts)
        for _ in range(gen):
            tokens = [int(logits.argmax()) for logits in self.compute_logits(rows, starts)]
            yield tokens
            starts = [start + len(row) for start, row in zip(starts, rows, strict=True)]
            rows = [[token] for token in tokens]

    def compute_logits(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Any]:
        """Logits after the last token of each row: numpy's float32 (vocab_size), valid until the next call.

        rows: token ids. starts: how many positions of each row are cached already.
        """
        import numpy

        batch, n, last_tokens = self._batch, 0, []
        token, pos, n_seq_id, seq_id, wanted = batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            for position, token_id in enumerate(row, start):
                token[n], pos[n], n_seq_id[n], seq_id[n][0], wanted[n] = token_id, position, 1, number, False
                n += 1
            wanted[n - 1] = True
            last_tokens.append(n - 1)
        batch.n_tokens = n
        if failure := self._lib.llama_decode(self._context, batch):
            raise LlamaError(f"llama.cpp's llama_decode returned {failure}, expected 0: leave it out of --compare")
        pointers = [self._lib.llama_get_logits_ith(self._context, index) for index in last_tokens]
        return [numpy.ctypeslib.as_array(pointer, (self._vocab_size,)) for pointer in pointers]


@cache  # the library calls the function until the program ends, so it must be kept
def log_errors_only() -> Any:
    """Make llama.cpp log only errors, to stderr; by default it also logs every tensor."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == ERROR_LEVEL:
            sys.stderr.write(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, None)
    return log


def check_architecture(args: ModelArgs, quantization: Quantization | None) -> None:
    """Raise LlamaError for what GGUF's architecture "llama" lacks, and for rows that groups can't divide."""
    scaling = args.rope_scaling
    columns = (args.dim, args.hidden_dim, args.n_heads * args.head_size)
    unsupported = {
        "biases": args.qkv_bias or args.wo_bias or args.mlp_bias,
        "norms of queries and keys": args.qk_norm,
        "a sliding window": args.sliding_window is not None,
        "rope scaling that depends on length": scaling is not None and scaling.type not in STATIC_SCALINGS,
        f"rows that groups of {GROUP} don't fill": quantization is not None and any(c % GROUP for c in columns),
    }
    if present := [what for what, is_present in unsupported.items() if is_present]:
        raise LlamaError(
            f"--compare llama.cpp is for plain Llama, and this model has {', '.join(present)}: leave it out"
        )


def write_gguf(
    path: Path,
    args: ModelArgs,
    dtype: torch.dtype,
    quantization: Quantization | None,
    tensors: Iterable[tuple[str, Tensor]],
    vocabulary: Vocabulary | None = None,
) -> int:
    """Write a model, by default without a vocabulary; returns how many bytes of it a decoding step reads.

    Rows stay in Meta's rotary order, which GGUF has for Llama too. Vectors are float32, as llama.cpp expects. The
    quantized matrices are those that this package quantizes. Raises LlamaError if the disk has no room.
    """
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, args)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary.add_to(writer)
    shapes = tensor_shapes(args)
    if args.rope_scaling is not None:
        shapes = {"rope_freqs.weight": (args.head_size // 2,), **shapes}
        tensors = chain([("rope_freqs.weight", compute_rope_factors(args))], tensors)
    get_gguf_name = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers).get_name
    types, sizes = {}, {}
    for name, shape in shapes.items():
        types[name] = gguf_type = gguf.GGMLQuantizationType[choose_gguf_type(name, args, dtype, quantization)]
        byte_shape = gguf.quant_shape_to_byte_shape(shape, gguf_type)
        sizes[name] = math.prod(byte_shape)
        gguf_name = str(get_gguf_name(name, (".weight",)))
        writer.add_tensor_info(gguf_name, byte_shape, numpy.dtype("uint8"), sizes[name], gguf_type)
    needed, free = sum(sizes.values()), shutil.disk_usage(path.parent).free
    if needed > free:
        sums = f"{needed / 1e9:.2f} GB are needed for llama.cpp's file, and {free / 1e9:.2f} GB are free there"
        raise LlamaError(f"{path.parent}: {sums}: set TMPDIR to a directory with room")
    with contextlib.closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            writer.write_tensor_data(encode_tensor(tensor, types[name]))
    return needed - (0 if args.tied_embeddings else sizes["tok_embeddings.weight"])


def add_metadata(writer: Any, args: ModelArgs) -> None:
    """Add the sizes of the model to a GGUFWriter."""
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_key_length(args.head_size)
    writer.add_value_length(args.head_size)
    writer.add_rope_dimension_count(args.head_size)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.norm_eps)


def compute_rope_factors(args: ModelArgs) -> Tensor:
    """The factors by which rope scaling divides the angle of each pair: float32 (head_size / 2)."""
    plain, _ = frequencies(args.head_size, args.rope_theta, None)
    scaled, _ = frequencies(args.head_size, args.rope_theta, args.rope_scaling)
    return plain / scaled


def choose_gguf_type(name: str, args: ModelArgs, dtype: torch.dtype, quantization: Quantization | None) -> str:
    """The name of a tensor's type in GGUF."""
    if name.endswith(("norm.weight", "rope_freqs.weight")):
        return GGUF_TYPES[torch.float32]
    if quantization is not None and is_multiplied(name, args):
        return QUANTIZED_GGUF_TYPES[quantization]
    return GGUF_TYPES[dtype]


def encode_tensor(tensor: Tensor, gguf_type: Any) -> Any:
    """A tensor's bytes in a type of GGUF: numpy's uint8."""
    import gguf
    import numpy

    for dtype, name in GGUF_TYPES.items():
        if gguf_type.name == name:
            return tensor.to(dtype).contiguous().view(torch.uint8).numpy()
    return numpy.concatenate([gguf.quantize(rows.float().numpy(), gguf_type) for rows in tensor.split(ROWS)])
