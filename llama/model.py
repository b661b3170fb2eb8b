"""The network: the decoder-only transformer of the Llama papers, split over model-parallel ranks by fairscale's layers.

Knows no files, no kernels and no sampling. The shape of a tensor stands in a trailing comment wherever it changes:
B rows of a batch, T tokens a row, S cached positions, H query heads and KV key/value heads *of this rank*, D head size.
"""

import math
from dataclasses import dataclass

import fairscale.nn.model_parallel.initialize as fs_init
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, linalg, nn

from ._util.fast_form import FastForm
from ._util.slots import Caches, KVCache, find_caches, in_slots, place_rows
from .errors import LlamaError
from .kv_cache import Pass, StartPos, first_and_last, update
from .rotary import RopeScaling, compute_dynamic_freqs_cis, precompute_freqs_cis

MP_SIZE = "the model-parallel size"  # as error messages call it


@dataclass
class ModelArgs:
    """The sizes that make a model: those of a checkpoint's `params.json`, and of the KV cache."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: as many as the tokenizer has words
    multiple_of: int = 256  # the hidden size of the feed-forward is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000

    max_batch_size: int = 32
    max_seq_len: int = 2048

    # What Meta's first reference did not have. These fields tell the families apart.
    rope_scaling: RopeScaling | None = None
    head_dim: int | None = None  # None: dim / n_heads
    qkv_bias: bool = False
    wo_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMS norm of each head's query and key, before they are rotated
    tied_embeddings: bool = False  # the output layer uses the embedding's matrix
    sliding_window: int | None = None  # positions that a query sees, its own included; None: all
    sliding_layers: tuple[int, ...] | None = None  # the layers with that window; None: all

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def hidden_dim(self) -> int:
        return feed_forward_size(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)


def feed_forward_size(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Two thirds of `hidden_dim` (SwiGLU has three matrices instead of two), scaled, rounded up to `multiple_of`."""
    hidden_dim = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        hidden_dim = int(ffn_dim_multiplier * hidden_dim)
    return multiple_of * math.ceil(hidden_dim / multiple_of)


def divide(name: str, total: int, by: str, parts: int) -> int:
    """`total / parts`. Raises LlamaError, naming both, when that leaves a remainder."""
    if parts < 1 or total < 1 or total % parts:
        raise LlamaError(f"{name} = {total} cannot be divided by {by} = {parts}: choose sizes that divide evenly")
    return total // parts


class RMSNorm(nn.Module):
    """Root mean square layer normalization (arXiv:1910.07467), accumulated in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """View `freqs_cis`, (T, D/2) or (B, T, D/2), so that it multiplies x of shape (B, T, heads, D/2)."""
    if freqs_cis.shape == (x.shape[1], x.shape[-1]):
        return freqs_cis.view(1, x.shape[1], 1, x.shape[-1])
    if freqs_cis.shape == (x.shape[0], x.shape[1], x.shape[-1]):
        return freqs_cis.view(x.shape[0], x.shape[1], 1, x.shape[-1])
    raise LlamaError(f"freqs_cis of shape {tuple(freqs_cis.shape)} does not fit x of shape {tuple(x.shape)}")


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each pair of neighbours of xq (B, T, H, D) and xk (B, T, KV, D) by its position's angle, in float32."""
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))  # (B, T, H, D/2)
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))  # (B, T, KV, D/2)
    freqs_cis = reshape_for_broadcast(freqs_cis, xq_)
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)  # (B, T, H, D)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)  # (B, T, KV, D)
    return xq_out.type_as(xq), xk_out.type_as(xk)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Give every query head its own key or value: (B, S, KV, D) -> (B, S, KV * n_rep, D).

    The definition of grouped-query attention (arXiv:2305.13245). `Attention` leaves it to torch's kernels, which read
    each key head once for its whole group.
    """
    return x if n_rep == 1 else torch.repeat_interleave(x, n_rep, dim=2)


class Attention(nn.Module):
    """Grouped-query self-attention over this rank's share of the heads, with the rows' KV cache.

    On more ranks than key/value heads, neighbouring ranks hold the same head.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        mp_size = fs_init.get_model_parallel_world_size()
        if args.head_dim is None:
            divide("dim", args.dim, "n_heads", args.n_heads)
        self.head_dim = args.head_size
        divide("head_dim", self.head_dim, "the size of a rotary pair", 2)
        divide("n_heads", args.n_heads, "n_kv_heads", args.kv_heads)
        n_kv_heads = max(args.kv_heads, mp_size)  # a head counts once for each rank that holds it
        divide("n_kv_heads", n_kv_heads, "n_kv_heads", args.kv_heads)
        self.n_local_heads = divide("n_heads", args.n_heads, MP_SIZE, mp_size)
        self.n_local_kv_heads = divide("n_kv_heads", n_kv_heads, MP_SIZE, mp_size)
        self.n_rep = self.n_local_heads // self.n_local_kv_heads

        dim, q_dim, kv_dim = args.dim, args.n_heads * self.head_dim, n_kv_heads * self.head_dim
        self.wq = ColumnParallelLinear(dim, q_dim, bias=args.qkv_bias, gather_output=False)
        self.wk = ColumnParallelLinear(dim, kv_dim, bias=args.qkv_bias, gather_output=False)
        self.wv = ColumnParallelLinear(dim, kv_dim, bias=args.qkv_bias, gather_output=False)
        self.wo = RowParallelLinear(q_dim, dim, bias=args.wo_bias, input_is_parallel=True)
        self.q_norm = RMSNorm(self.head_dim, eps=args.norm_eps) if args.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=args.norm_eps) if args.qk_norm else nn.Identity()

        self.cache_shape = (args.max_batch_size, self.n_local_kv_heads, args.max_seq_len, self.head_dim)
        self.cache_k: Tensor | None  # (max_batch_size, max_seq_len, KV, D) from the first use on
        self.cache_v: Tensor | None
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)

    def caches(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The caches of keys and values, made at first use. In memory they lie as (slots, KV, S, D)."""
        if self.cache_k is None or self.cache_v is None:
            with torch.inference_mode(False):  # usable in and out of inference mode, whatever came first
                self.cache_k, self.cache_v = (
                    torch.zeros(self.cache_shape, dtype=like.dtype, device=like.device).transpose(1, 2)
                    for _ in range(2)
                )
        return self.cache_k, self.cache_v

    def forward(self, x: Tensor, start_pos: StartPos | None, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, T, dim). start_pos: None means no cache.

        mask: bool (B, 1, T, S), True where a query sees a key, or numbers that are added to the scores. None: one token
        sees all that is cached, and several tokens, which start at position 0, see those before them.
        """
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, self.n_local_heads, self.head_dim)  # (B, T, H, D)
        xk = self.wk(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)  # (B, T, KV, D)
        xv = self.wv(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)  # (B, T, KV, D)
        output = self.attend(self.q_norm(xq), self.k_norm(xk), xv, start_pos, freqs_cis, mask)  # (B, T, H, D)
        return self.wo(output.reshape(bsz, seqlen, -1))  # (B, T, dim)

    def attend(
        self,
        xq: Tensor,
        xk: Tensor,
        xv: Tensor,
        start_pos: StartPos | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        caches: Caches | None = None,
    ) -> Tensor:
        """Rotate queries and keys, write the cache, attend: (B, T, H, D). caches: None: those of the pass."""
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        # torch's attention on a CPU may hide what isn't finite: `taint` is 0, or NaN in a row where something isn't
        norms = (linalg.vector_norm(x.detach(), torch.inf, (1, 2, 3), keepdim=True) for x in (xq, xk))  # (B, 1, 1, 1)
        taint = sum(0 * norm for norm in norms) if xq.is_cpu else 0
        if start_pos is not None:
            end = mask.shape[-1] if mask is not None else int(start_pos) + xq.shape[1]
            cache_k, cache_v, rows = caches or find_caches(self, xk)
            xk, xv = update(cache_k, cache_v, xk, xv, start_pos, end, rows)  # (B, S, KV, D)
        return self.weigh(xq, xk, xv, mask) + taint

    def weigh(self, xq: Tensor, xk: Tensor, xv: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(Q K^T / sqrt(D)) V of queries (B, T, H, D), and of keys and values (B, S, KV, D): (B, T, H, D)."""
        bsz, seqlen, *heads = xq.shape
        xq, xk, xv = (x.transpose(1, 2) for x in (xq, xk, xv))  # (B, H, T, D), (B, KV, S, D) twice
        is_causal = mask is None and seqlen > 1
        if not is_causal:  # queries that share a key head become tokens of that head, so that no kernel copies heads
            xq = xq.reshape(bsz, self.n_local_kv_heads, -1, self.head_dim)  # (B, KV, H / KV * T, D)
            mask = mask.repeat(1, 1, self.n_rep, 1) if mask is not None and seqlen > 1 else mask
        output = F.scaled_dot_product_attention(
            xq, xk, xv, attn_mask=mask, is_causal=is_causal, enable_gqa=is_causal and self.n_rep > 1
        )  # (B, H, T, D), or (B, KV, H / KV * T, D)
        return output.reshape(bsz, heads[0], seqlen, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(
        self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None, bias: bool = False
    ):
        super().__init__()
        hidden_dim = feed_forward_size(hidden_dim, multiple_of, ffn_dim_multiplier)
        mp_size = fs_init.get_model_parallel_world_size()
        divide("hidden_dim", hidden_dim, MP_SIZE, mp_size)
        self.w1 = ColumnParallelLinear(dim, hidden_dim, bias=bias, gather_output=False)
        self.w2 = RowParallelLinear(hidden_dim, dim, bias=bias, input_is_parallel=True)
        self.w3 = ColumnParallelLinear(dim, hidden_dim, bias=bias, gather_output=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, dim) -> (B, T, hidden_dim / ranks) -> (B, T, dim)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        sliding = args.sliding_layers is None or layer_id in args.sliding_layers
        self.window = args.sliding_window if sliding else None  # positions that a query sees; None: all
        self.attention = Attention(args)
        sizes = (args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
        self.feed_forward = FeedForward(*sizes, bias=args.mlp_bias)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor, start_pos: StartPos | None, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """Token ids to logits. Needs fairscale's model-parallel groups (`llama.parallel.initialize`) to be built.

    Raises LlamaError, naming the numbers, when the sizes don't divide over heads or ranks.
    """

    def __init__(self, params: ModelArgs):
        super().__init__()
        if not fs_init.model_parallel_is_initialized():
            raise LlamaError("there is no model-parallel group: call llama.parallel.initialize() first")
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        if params.vocab_size < 1:
            raise LlamaError(f"vocab_size is {params.vocab_size}: set it to the number of words of the tokenizer")
        mp_size = fs_init.get_model_parallel_world_size()
        divide("vocab_size", params.vocab_size, MP_SIZE, mp_size)

        self.tok_embeddings = VocabParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, eps=params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, bias=False)
        self.tie_embeddings()
        self.kv_cache = KVCache()  # the engine's slots
        self.freqs_cis: Tensor | None = None  # no buffer: a model cast to bfloat16 keeps its angles complex64
        self.fast: FastForm | None = None  # set by `llama.accelerate`

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device if self.fast is None else self.fast.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype if self.fast is None else self.fast.dtype

    def forward(
        self,
        tokens: Tensor,
        start_pos: StartPos | None = None,
        *,
        slots: Tensor | None = None,
        return_hidden: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Logits of every position: float32 (B, T, vocab_size).

        tokens: integers (B, T). With `start_pos`, an int or a (B,) tensor of them, row b's first token stands at
        position start_pos[b] and attends to what the KV cache holds before it; no gradient flows. Without it, nothing
        is cached, and the result is differentiable.
        slots: (B,) of those of `kv_cache`, one for each row; None: those that belong to calls by hand.
        return_hidden: return (logits, hidden states) too. The hidden states are transformers' `hidden_states`: n_layers
        + 1 tensors (B, T, dim), the embeddings, the output of each layer but the last, and the normed last output.
        """
        differentiable = torch.is_grad_enabled() and start_pos is None
        with self.kv_cache.lock, torch.set_grad_enabled(differentiable):
            self.refresh(trains=differentiable and self.training)
            inputs = self.prepare(tokens, start_pos, None, slots)
            hidden: list[Tensor] | None = [] if return_hidden else None
            if self.fast is not None and self.fast.is_usable():
                logits = self.fast.forward(inputs, hidden)
            else:
                logits = self.output(self.run(inputs, hidden)).float()
            return logits if hidden is None else (logits, tuple(hidden))

    def refresh(self, trains: bool = False) -> None:
        """Let the fast form, if there is one, take over what was edited in the weights and layers."""
        if self.fast is not None:
            self.fast.refresh(trains)

    def hidden_states(
        self,
        tokens: Tensor,
        start_pos: StartPos | None = None,
        lengths: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """What `forward` computes before the output layer: (B, T, dim), normed.

        start_pos: may be on the CPU even if the model isn't, which saves waiting for the model's device.
        lengths: (B), the tokens of each row without padding, or (B, T), how many there are up to each token; None: rows
        have no padding. Only `dynamic` rotary scaling uses it. slots: as in `forward`.
        """
        with self.kv_cache.lock, torch.set_grad_enabled(torch.is_grad_enabled() and start_pos is None):
            self.refresh()
            inputs, fast = self.prepare(tokens, start_pos, lengths, slots), self.fast
            return fast.hidden_states(inputs) if fast is not None and fast.is_usable() else self.run(inputs)

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., dim) -> float32 (..., vocab_size)."""
        self.refresh()
        if self.fast is not None and self.fast.is_usable():
            return self.fast.logits(h)
        return self.output(h).float()

    def run(self, inputs: Pass, hidden: list[Tensor] | None = None) -> Tensor:
        """The layers, one after the other: (B, T) -> (B, T, dim), normed.

        hidden: a list that gets the input of each layer and the result, (B, T, dim) each.
        """
        mask, window_mask = inputs.mask(), inputs.mask(self.params.sliding_window)
        with in_slots(inputs.slots):
            h = self.tok_embeddings(inputs.tokens)  # (B, T, dim)
            for layer in self.layers:
                if hidden is not None:
                    hidden.append(h)
                h = layer(h, inputs.start_pos, inputs.freqs_cis, mask if layer.window is None else window_mask)
        h = self.norm(h)
        if hidden is not None:
            hidden.append(h)
        return h

    def tie_embeddings(self) -> None:
        """Make the output layer use the embedding's matrix, in models where they are one."""
        if self.params.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def prepare(
        self, tokens: Tensor, start_pos: StartPos | None, lengths: Tensor | None = None, slots: Tensor | None = None
    ) -> Pass:
        """Check where the tokens stand, and compute their angles. Raises LlamaError for what the cache cannot hold."""
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise LlamaError(f"tokens have shape {tuple(tokens.shape)}, expected (rows, positions), each at least 1")
        (bsz, seqlen), device, first, last = tokens.shape, tokens.device, 0, 0
        if start_pos is not None:
            first, last = first_and_last(start_pos, bsz)
            if bsz > self.params.max_batch_size or first < 0 or last + seqlen > self.params.max_seq_len:
                raise LlamaError(
                    f"{bsz} rows at positions {first} to {last + seqlen - 1} do not fit the KV cache of max_batch_size="
                    f"{self.params.max_batch_size} rows and max_seq_len={self.params.max_seq_len} positions"
                )
        if isinstance(start_pos, Tensor):
            start_pos = first if first == last else start_pos.to(device, non_blocking=start_pos.is_pinned())
        starts = start_pos[:, None] if isinstance(start_pos, Tensor) else first
        positions = starts + torch.arange(seqlen, device=device)  # (T) or (B, T)
        angles = self.find_angles(positions, last + seqlen, lengths)
        places = place_rows(self.kv_cache, slots, bsz, None if start_pos is None else last + seqlen, device)
        return Pass(tokens, start_pos, positions, first, last, angles, places)

    def find_angles(self, positions: Tensor, end: int, lengths: Tensor | None) -> Tensor:
        """Angles at `positions`, (T) or (B, T), all below `end`: complex64 (T, D/2) or (B, T, D/2)."""
        args, device = self.params, positions.device
        if args.rope_scaling is not None and args.rope_scaling.type == "dynamic":
            return compute_dynamic_freqs_cis(args.head_size, positions, lengths, args.rope_theta, args.rope_scaling)
        if self.freqs_cis is None or self.freqs_cis.shape[0] < end:
            end = max(end, args.max_seq_len)
            with torch.inference_mode(False), torch.device("cpu"):
                self.freqs_cis = precompute_freqs_cis(args.head_size, end, args.rope_theta, args.rope_scaling)
        self.freqs_cis = self.freqs_cis.to(device)
        return self.freqs_cis[positions]
