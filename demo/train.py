"""Trains the demo model from scratch: text from `demo/corpus.py`, a byte-pair vocabulary, then the network.

    python -m demo.train [--output demo/model] [--steps 2400] [--seed 1] [--device cpu]

Writes a checkpoint in Meta's format (params.json, consolidated.00.pth, tokenizer.model) and prints how many held-out
questions it answers. The optimizer loop is the plainest that works. Knows nothing of inference.
"""

import base64
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BytePairTokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from demo.corpus import Document, generate_documents
from demo.evaluate import evaluate
from llama import LlamaError, parallel
from llama._util.device import choose_dtype
from llama._util.files import write_whole
from llama.checkpoints.meta import save_checkpoint
from llama.cli.program import run
from llama.model import ModelArgs, Transformer
from llama.tokenizer import ChatFormat, Tokenizer

N_WORDS = 2816  # and 256 special tokens: 3072 words, which 1, 2, 4 and 8 ranks divide
ARGS = ModelArgs(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, multiple_of=64, max_seq_len=512)
TOKENS_PER_BATCH, BATCHES_PER_STEP = 2048, 2  # a batch has documents of one length, so of few kinds: two are mixed
IGNORED = -100
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 100, 0.05


@dataclass(frozen=True)
class Batch:
    """Documents of similar length."""

    tokens: Tensor  # (B, T), padded on the right with 0
    positions: Tensor  # (N): in the flattened (B * (T - 1)) inputs, where the next token is learnt; padded with 0
    targets: Tensor  # (N): that token; padded with IGNORED

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.positions.to(device), self.targets.to(device))


def train_tokenizer(path: Path, texts: Iterator[str]) -> None:
    """Learn a byte-pair encoding of `texts`; write it as tiktoken reads it, a line of base64 token and rank each."""
    tokenizer = BytePairTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(Tokenizer.pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = map_characters_to_bytes()
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [b"%s %d\n" % (base64.b64encode(bytes(byte_of[c] for c in word)), rank) for word, rank in words]
    write_whole(path, lambda f: f.writelines(lines))


def map_characters_to_bytes() -> dict[str, int]:
    """The byte of each printable character that byte-level vocabularies use in place of bytes.

    Visible Latin-1 characters stand for themselves, characters from U+0100 on for the other bytes.
    """
    visible = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace() and b != 0xAD]
    others = [b for b in range(256) if b not in visible]
    return {**{chr(b): b for b in visible}, **{chr(256 + i): b for i, b in enumerate(others)}}


def get_text(document: Document) -> str:
    return document.text or "\n".join(message["content"] for message in document.messages)


def encode(document: Document, chat: ChatFormat) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether it is learnt: all of a text but its first, and the answers of a dialog."""
    if document.text:
        tokens = chat.tokenizer.encode(document.text, bos=True, eos=True)
        return tokens, [False] + [True] * (len(tokens) - 1)
    tokens, learn = [chat.tokenizer.bos_id], [False]
    for message in document.messages:
        header, whole = chat.encode_header(message), chat.encode_message(message)
        tokens += whole
        learn += [message["role"] == "assistant" and i >= len(header) for i in range(len(whole))]
    return tokens, learn


def generate_batches(seed: int, chat: ChatFormat) -> Iterator[Batch]:
    """Endless batches of about TOKENS_PER_BATCH tokens. Documents of similar length go together, to pad little."""
    rng = random.Random(seed)
    documents = generate_documents(seed, 10**9)
    while pool := [encode(d, chat) for d in itertools.islice(documents, 8192)]:
        pool = [pair for pair in pool if len(pair[0]) <= ARGS.max_seq_len]
        pool.sort(key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for pair in pool:
            if (len(groups[-1]) + 1) * round_up(len(pair[0]), 16) > TOKENS_PER_BATCH:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        yield from map(make_batch, groups)


def make_batch(group: list[tuple[list[int], list[bool]]]) -> Batch:
    """A batch of (tokens, learn). Sizes are rounded up: with fewer shapes the CPU library builds fewer kernels."""
    length = round_up(max(len(tokens) for tokens, _ in group), 16)
    rows = TOKENS_PER_BATCH // length
    tokens, learn = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.bool)
    for i, (row, learnt) in enumerate(group):
        tokens[i, : len(row)], learn[i, : len(row)] = torch.tensor(row), torch.tensor(learnt)
    positions = learn[:, 1:].flatten().nonzero().squeeze(1)
    padding = round_up(len(positions), 128) - len(positions)
    targets = F.pad(tokens[:, 1:].flatten()[positions], (0, padding), value=IGNORED)
    return Batch(tokens, F.pad(positions, (0, padding)), targets)


def round_up(number: int, to: int) -> int:
    return -(-number // to) * to


def compute_loss(model: Transformer, batch: Batch) -> Tensor:
    """Mean cross-entropy of the tokens to be learnt. The output layer runs only for their positions."""
    h = model.hidden_states(batch.tokens[:, :-1]).flatten(0, 1)  # (B * (T - 1), dim)
    return F.cross_entropy(model.logits(h[batch.positions]), batch.targets, ignore_index=IGNORED)


def compute_learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to 0."""
    return PEAK_LR * min((step + 1) / WARMUP_STEPS, (steps - step) / max(steps - WARMUP_STEPS, 1))


def initialize_weights(model: Transformer) -> None:
    """Normal(0, 0.02); projections into the residual stream are scaled down by depth, as in GPT-2."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            depth = (2 * model.n_layers) ** 0.5 if name.endswith(("wo.weight", "w2.weight")) else 1
            torch.nn.init.normal_(parameter, std=0.02 / depth)


def train_network(chat: ChatFormat, steps: int, seed: int, device: torch.device) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(replace(ARGS, vocab_size=chat.tokenizer.n_words))
    initialize_weights(model)
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    half = choose_dtype(None, device)
    stream = generate_batches(seed, chat)
    bar = tqdm(range(steps), unit="step", desc="training", mininterval=1)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, steps)
        for batch in itertools.islice(stream, BATCHES_PER_STEP):
            # MATH: on a CPU, with rows this short, the fused attention's backward pass takes a third of the time.
            with torch.autocast(device.type, half, enabled=half == torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                loss = compute_loss(model, batch.to(device)) / BATCHES_PER_STEP
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item() * BATCHES_PER_STEP:.3f}")
    return model


def main(
    output: str = str(Path(__file__).parent / "model"),
    steps: int = 2400,
    seed: int = 1,
    device: str | None = None,
) -> None:
    place = parallel.initialize(device=device)
    if place.world_size > 1:
        raise LlamaError(f"the demo model is trained by one process, not {place.world_size}: start without torchrun")
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    train_tokenizer(directory / "tokenizer.model", map(get_text, generate_documents(seed, 30_000)))
    chat = ChatFormat(Tokenizer(str(directory / "tokenizer.model")))
    model = train_network(chat, steps, seed, place.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {chat.tokenizer.n_words} words -> {directory}")
    save_checkpoint(directory, model.params, {name: t.bfloat16().cpu() for name, t in model.state_dict().items()})
    evaluate(output, device=device)


if __name__ == "__main__":
    run(main)
