"""The network: the decoder-only transformer of the Llama papers, split over model-parallel ranks by fairscale's layers.

Knows no files, no devices and no sampling. The shape of a tensor stands in a trailing comment wherever it changes:
B rows of a batch, T tokens a row, S cached positions, H query heads and KV key/value heads *of this rank*, D head size.
"""

import math
from dataclasses import dataclass

import fairscale.nn.model_parallel.initialize as fs_init
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from .errors import LlamaError
from .rotary import RopeScaling, frequencies, grown_theta, powers

MP_SIZE = "the model-parallel size"  # as error messages call it
StartPos = int | Tensor  # where a row's first token stands: one position for all rows, or (B,) of them
Inputs = tuple[Tensor, StartPos | None, Tensor, Tensor | None, Tensor | None]  # what `Transformer.run` takes


@dataclass
class ModelArgs:
    """The sizes that make a model. Those of a checkpoint are its `params.json`; two, max_*, size the KV cache."""

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

    # What Meta's first reference had not comes after what it had: this is what tells the families apart.
    rope_scaling: RopeScaling | None = None
    head_dim: int | None = None  # None: dim / n_heads
    qkv_bias: bool = False
    wo_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's query and key, before they are rotated
    tied_embeddings: bool = False  # the output layer is the matrix of the embedding
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


def first_and_last(start_pos: StartPos, bsz: int) -> tuple[int, int]:
    """The smallest and the largest start position. Raises LlamaError unless there is one for all rows, or one a row."""
    if isinstance(start_pos, int):
        return start_pos, start_pos
    if not isinstance(start_pos, Tensor) or start_pos.is_floating_point() or start_pos.shape != (bsz,):
        raise LlamaError(f"start_pos is {start_pos!r}, expected an int, or a tensor of one for each of {bsz} rows")
    first, last = torch.stack(start_pos.aminmax()).tolist()
    return first, last


def divide(name: str, total: int, by: str, parts: int) -> int:
    """`total / parts`. Raises LlamaError, naming both, when that leaves a remainder."""
    if parts < 1 or total < 1 or total % parts:
        raise LlamaError(f"{name} = {total} cannot be divided by {by} = {parts}: choose sizes that divide evenly")
    return total // parts


def attention_mask(positions: Tensor, end: int, window: int | None = None) -> Tensor:
    """Which of the first `end` positions queries at `positions` see, (T) or (B, T): bool (1 or B, 1, T, end).

    All up to their own; with a window, the last `window` of those.
    """
    seen = torch.arange(end, device=positions.device)  # (S)
    own = positions[..., None]  # (T, 1) or (B, T, 1)
    mask = seen <= own
    if window is not None:
        mask &= seen > own - window
    return mask.view(-1, 1, *mask.shape[-2:])


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


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> Tensor:
    """Rotary angles (arXiv:2104.09864) as complex numbers: complex64 of shape (end, dim / 2).

    Row t holds exp(i * t * theta^(-2j / dim)) for j in 0..dim/2, or what `scaling` makes of it. Built on torch's
    current default device.
    """
    freqs, length = frequencies(dim, theta, scaling)  # (dim / 2)
    angles = torch.outer(torch.arange(end, dtype=torch.float32), freqs)  # (end, dim / 2)
    return torch.polar(torch.full_like(angles, length), angles)


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

    What grouped-query attention means (arXiv:2305.13245), spelled out. `Attention` leaves it to torch's kernels, which
    read each key head once for its whole group instead of copying it.
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
        n_kv_heads = max(args.kv_heads, mp_size)  # with what is repeated
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
        self.cache_k: Tensor | None  # (max_batch_size, max_seq_len, KV, D) from the first use of a position on
        self.cache_v: Tensor | None
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)

    def caches(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The caches of keys and values, made at first use. In memory, one head's positions stand side by side."""
        if self.cache_k is None or self.cache_v is None:
            with torch.inference_mode(False):  # usable in and out of inference mode, whatever came first
                self.cache_k, self.cache_v = (
                    torch.zeros(self.cache_shape, dtype=like.dtype, device=like.device).transpose(1, 2)
                    for _ in range(2)
                )
        return self.cache_k, self.cache_v

    def update_cache(self, xk: Tensor, xv: Tensor, start_pos: StartPos, end: int) -> tuple[Tensor, Tensor]:
        """Write xk and xv (B, T, KV, D) at their rows' positions; returns the first `end` positions, (B, S, KV, D)."""
        cache_k, cache_v = self.caches(xk)
        bsz, seqlen = xk.shape[:2]
        if isinstance(start_pos, int):
            cache_k[:bsz, start_pos:end] = xk
            cache_v[:bsz, start_pos:end] = xv
        else:
            rows = torch.arange(bsz, device=xk.device)[:, None]  # (B, 1)
            columns = start_pos[:, None] + torch.arange(seqlen, device=xk.device)  # (B, T)
            cache_k[rows, columns] = xk
            cache_v[rows, columns] = xv
        return cache_k[:bsz, :end], cache_v[:bsz, :end]

    def forward(self, x: Tensor, start_pos: StartPos | None, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, T, dim). start_pos None: no cache. mask: bool (B, 1, T, S), True where a query may look. None says
        that this goes without saying: T = 1 looks at all that is cached, or T tokens start at 0 and look back."""
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, self.n_local_heads, self.head_dim)  # (B, T, H, D)
        xk = self.wk(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)  # (B, T, KV, D)
        xv = self.wv(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)  # (B, T, KV, D)
        output = self.attend(self.q_norm(xq), self.k_norm(xk), xv, start_pos, freqs_cis, mask)  # (B, T, H, D)
        return self.wo(output.reshape(bsz, seqlen, -1))  # (B, T, dim)

    def attend(
        self, xq: Tensor, xk: Tensor, xv: Tensor, start_pos: StartPos | None, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Rotate, cache, and let the queries look: (B, T, H, D)."""
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        if start_pos is not None:
            end = mask.shape[-1] if mask is not None else int(start_pos) + xq.shape[1]
            xk, xv = self.update_cache(xk, xv, start_pos, end)  # (B, S, KV, D)
        return self.look(xq, xk, xv, mask)

    def look(self, xq: Tensor, xk: Tensor, xv: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(Q K^T / sqrt(D)) V of queries (B, T, H, D), and of keys and values (B, S, KV, D): (B, T, H, D)."""
        bsz, seqlen, *heads = xq.shape
        xq, xk, xv = (x.transpose(1, 2) for x in (xq, xk, xv))  # (B, H, T, D), (B, KV, S, D) twice
        is_causal = mask is None and seqlen > 1
        if not is_causal:  # queries that share a key head are read as so many tokens of it: no kernel then copies heads
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
            raise LlamaError("no model-parallel group is there: call llama.parallel.initialize() first")
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
        self.freqs_cis: Tensor | None = None  # no buffer: a model cast to bfloat16 keeps its angles complex64

    def forward(
        self, tokens: Tensor, start_pos: StartPos | None = None, *, return_hidden: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Logits of every position: float32 (B, T, vocab_size).

        tokens: integers (B, T). With `start_pos`, an int or a (B,) tensor of them, row b's first token stands at
        position start_pos[b] and looks at what the KV cache holds before it; no gradient flows. Without, the tokens
        are all there is, nothing is cached, and the result is differentiable.
        return_hidden: (logits, what transformers calls hidden_states), the latter n_layers + 1 of (B, T, dim): the
        embeddings, what each layer but the last gives, and what the last gives, normed.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and start_pos is None):
            if not return_hidden:
                return self.logits(self.hidden_states(tokens, start_pos))
            hidden: list[Tensor] = []
            h = Transformer.run(self, *self._prepared(tokens, start_pos), hidden)  # never steps that were recorded
            return self.logits(h), (*hidden, h)

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., dim) of the positions that are wanted -> their logits, float32 (..., vocab_size)."""
        return self.output(h).float()

    def tie_embeddings(self) -> None:
        """Make the output layer's matrix the embedding's, in models where they are one."""
        if self.params.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def hidden_states(self, tokens: Tensor, start_pos: StartPos | None = None, lengths: Tensor | None = None) -> Tensor:
        """What `forward` computes before the output layer: (B, T, dim), normed.

        start_pos: may be on the CPU wherever the model is, so that nobody waits for another device to tell its numbers.
        lengths: (B,) how many of each row's tokens are no padding; None: all; (B, T) how many had come with each token.
        Only `dynamic` rotary scaling asks.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and start_pos is None):
            return self.run(*self._prepared(tokens, start_pos, lengths))

    def _prepared(self, tokens: Tensor, start_pos: StartPos | None, lengths: Tensor | None = None) -> Inputs:
        """What `run` takes. Raises LlamaError for what has no place in the cache."""
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise LlamaError(
                f"tokens have shape {tuple(tokens.shape)}, expected (rows, positions), at least one of each"
            )
        seqlen, device, first, last = tokens.shape[1], tokens.device, 0, 0
        if start_pos is not None:
            first, last = first_and_last(start_pos, tokens.shape[0])
            self._check_room(tokens.shape[0], seqlen, first, last)
        if isinstance(start_pos, Tensor):
            start_pos = first if first == last else start_pos.to(device, non_blocking=start_pos.is_pinned())
        starts = start_pos[:, None] if isinstance(start_pos, Tensor) else first
        positions = starts + torch.arange(seqlen, device=device)  # (T) or (B, T)
        freqs_cis = self._rotary(positions, last + seqlen, lengths)
        return tokens, start_pos, freqs_cis, *self.masks(start_pos, positions, first, last)

    def _check_room(self, bsz: int, seqlen: int, first: int, last: int) -> None:
        if bsz > self.params.max_batch_size or first < 0 or last + seqlen > self.params.max_seq_len:
            raise LlamaError(
                f"{bsz} rows at positions {first} to {last + seqlen - 1} do not fit the KV cache of max_batch_size="
                f"{self.params.max_batch_size} rows and max_seq_len={self.params.max_seq_len} positions"
            )

    def masks(
        self, start_pos: StartPos | None, positions: Tensor, first: int, last: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """What tokens at `positions`, (T) or (B, T), look at in layers without a window, and in those with one.

        first, last: of the rows' starts. Both masks are as `Attention.forward` takes them, (1 or B, 1, T, S) or None.
        """
        mask, seqlen, window = None, positions.shape[-1], self.params.sliding_window
        if first < last or (first > 0 and seqlen > 1):  # not all of the cache is every query's past
            mask = attention_mask(positions, last + seqlen)
        if window is None or last + seqlen <= window:
            return mask, mask
        return mask, attention_mask(positions, last + seqlen, window)

    def run(
        self,
        tokens: Tensor,
        start_pos: StartPos | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        window_mask: Tensor | None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """The network itself, of which all else is preparation: (B, T) -> (B, T, dim), normed.

        hidden: to be filled with what each layer is given, (B, T, dim).
        """
        h = self.tok_embeddings(tokens)  # (B, T, dim)
        for layer in self.layers:
            if hidden is not None:
                hidden.append(h)
            h = layer(h, start_pos, freqs_cis, mask if layer.window is None else window_mask)
        return self.norm(h)

    def _rotary(self, positions: Tensor, end: int, lengths: Tensor | None) -> Tensor:
        """Angles at `positions`, (T) or (B, T), all below `end`: complex64 (T, D/2) or (B, T, D/2).

        lengths: as in `hidden_states`.
        """
        args, device = self.params, positions.device
        if args.rope_scaling is not None and args.rope_scaling.type == "dynamic":
            ends = positions[..., -1:] + 1 if lengths is None else positions[..., :1] + lengths.view(len(lengths), -1)
            theta = grown_theta(args.head_size, args.rope_theta, args.rope_scaling, ends)  # ([B], 1 or T, 1)
            angles = positions[..., None] * powers(args.head_size, theta)  # ([B], T, D/2)
            return torch.polar(torch.ones_like(angles), angles)
        if self.freqs_cis is None or self.freqs_cis.shape[0] < end:
            end = max(end, args.max_seq_len)
            with torch.inference_mode(False), torch.device("cpu"):
                self.freqs_cis = precompute_freqs_cis(args.head_size, end, args.rope_theta, args.rope_scaling)
        self.freqs_cis = self.freqs_cis.to(device)
        return self.freqs_cis[positions]

    def copy_cache_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` cached positions of row `source` over those of row `target`, in every layer."""
        for name, cache in self.named_buffers():
            if name.endswith(("cache_k", "cache_v")):
                cache[target, :length] = cache[source, :length]

    def reorder_cache_rows(self, sources: Tensor, length: int) -> None:
        """Make the first `length` cached positions of row i what those of row sources[i] were, in every layer.

        sources: integers (B,), on the CPU; a row may be the source of several. Rows that stay are not touched.
        """
        targets = (sources != torch.arange(len(sources))).nonzero().flatten()
        device = self.norm.weight.device
        moved, targets = sources[targets].to(device), targets.to(device)
        for name, cache in self.named_buffers():
            if len(targets) > 0 and name.endswith(("cache_k", "cache_v")):
                cache[targets, :length] = cache[moved, :length]  # all are read before one is written
