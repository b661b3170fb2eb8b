"""Any layout to any other and back, bit for bit; what is written loads in transformers; nothing is half-written."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import ARGS, PROMPTS, greedy_by_hand, run_program, split_checkpoint, write_checkpoint

from llama import Llama, LlamaError
from llama.checkpoints import huggingface
from llama.checkpoints.convert import convert
from llama.checkpoints.hf_config_writing import is_same_model
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.meta import read_shard
from llama.tokenizer import ChatFormat, Tokenizer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, eos_token_id=[3, 5]),
    "llama, tied, biases, llama3": transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12, rope_parameters=LLAMA3
    ),
    "llama, dynamic": transformers.LlamaConfig(**SIZES, rope_parameters=DYNAMIC),
    "llama, yarn": transformers.LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral, window": transformers.MistralConfig(**SIZES, sliding_window=7),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2, window, tied": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=24),
}


@pytest.fixture(params=CONFIGS)
def hf(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory that transformers wrote."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "mistral" in request.param else torch.float32
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, "norm" in name, 0.3)
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The warnings of transformers while a model loads."""
    listener, logger = Listener(), logging.getLogger("transformers")
    logger.addHandler(listener)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield listener.heard
    logger.removeHandler(listener)


def config(directory: Path) -> dict:
    """The configuration as transformers reads it, with defaults filled in."""
    found = transformers.AutoConfig.from_pretrained(directory).to_dict()
    return {**found, "_name_or_path": ""}


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("mp_size", [1, 2, 8])
def test_hugging_face_to_meta_and_back(hf: Path, tmp_path: Path, mp_size: int, warned: list[str]) -> None:
    convert(hf, tmp_path / "meta", "meta", mp_size)
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == mp_size
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    assert same(load_file(tmp_path / "back" / "model.safetensors"), load_file(hf / "model.safetensors"))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert warned == []
    assert config(tmp_path / "back") == config(hf)
    settings = "generation_config.json"
    assert json.loads((tmp_path / "back" / settings).read_text()) == json.loads((hf / settings).read_text())


METAS = {
    "plain": {},
    "Llama 3.1": {"use_scaled_rope": True},
    "another factor": {"use_scaled_rope": True, "rope_scaling_factor": 4},
    "biases": {"qkv_bias": True},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", METAS)
def test_meta_to_hugging_face_and_back(tmp_path: Path, name: str, shards: int, tied: bool, warned: list[str]) -> None:
    whole = write_checkpoint(tmp_path / "whole")
    tensors = torch.load(whole / "consolidated.00.pth", weights_only=True)
    if name == "biases":
        sizes = {"wq": 64, "wk": 32, "wv": 32}
        for layer in range(ARGS.n_layers):
            tensors |= {f"layers.{layer}.attention.{w}.bias": torch.randn(n) for w, n in sizes.items()}
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    torch.save(tensors, whole / "consolidated.00.pth")
    params = {**json.loads((whole / "params.json").read_text()), **METAS[name]}
    (whole / "params.json").write_text(json.dumps(params))
    source = split_checkpoint(whole, tmp_path / "meta", shards)
    convert(source, tmp_path / "hf", "hf")
    assert ("lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")) != tied
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert warned == []
    convert(tmp_path / "hf", tmp_path / "back", "meta", shards)
    for rank in range(shards):
        shard = f"consolidated.{rank:02d}.pth"
        assert same(read_shard(tmp_path / "back" / shard), read_shard(source / shard))
    assert is_same_model(open_checkpoint(tmp_path / "back").sizes, open_checkpoint(source).sizes)
    assert json.loads((tmp_path / "back" / "params.json").read_text()).items() >= METAS[name].items()
    llama = Llama.build(source, device="cpu", dtype="float32", max_seq_len=64)
    tokens = torch.arange(40).view(2, 20) * 7
    with torch.no_grad():
        expected = model(tokens).logits
        assert (llama.model(tokens) - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_a_hugging_face_directory_of_a_meta_tokenizer_is_whole(tmp_path: Path) -> None:
    """transformers gives the same answers: weights, ids, template and stop tokens are the same."""
    source = write_checkpoint(tmp_path / "meta")
    convert(source, tmp_path / "hf", "hf")
    ours = [Llama.build(d, device="cpu", dtype="float32", max_seq_len=128) for d in (source, tmp_path / "hf")]
    assert ours[0].text_completion(PROMPTS, temperature=0) == ours[1].text_completion(PROMPTS, temperature=0)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    dialog = [{"role": "system", "content": " short "}, {"role": "user", "content": "héllo"}]
    expected = ChatFormat(Tokenizer(source / "tokenizer.model")).encode_dialog_prompt(dialog)
    assert ours[1].formatter.encode_dialog_prompt(dialog) == expected
    assert theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False) == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert set(model.generation_config.eos_token_id) == ours[0].tokenizer.stop_tokens
    prompt = theirs(PROMPTS[0], return_tensors="pt")
    generated = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0].tolist()
    ids = prompt["input_ids"][0].tolist()
    assert [t for t in generated[len(ids) :] if t not in ours[0].tokenizer.stop_tokens] == greedy_by_hand(
        ours[0], ids, 20
    )


def test_the_published_vocabulary_in_the_other_form(published: Tokenizer, tmp_path: Path) -> None:
    from llama.tokenization.export import write_tokenizer_json

    write_tokenizer_json(published, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        *PROMPTS,
        Path(__file__).read_text(),
        "  1234567 \n\n\t don't WE'LL\r\n  ",
        "العربية 日本語 ไทย",
        "\u200d" * 9,
    ]
    for text in texts:
        assert theirs(text).input_ids == published.encode(text, bos=True, eos=False)


def test_tensors_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]) -> None:
    monkeypatch.setattr(huggingface, "FILE_BYTES", 200_000)
    source = write_checkpoint(tmp_path / "meta")
    convert(source, tmp_path / "hf", "hf")
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert warned == []
    convert(tmp_path / "hf", tmp_path / "back", "meta")
    assert same(read_shard(tmp_path / "back" / "consolidated.00.pth"), read_shard(source / "consolidated.00.pth"))


@pytest.mark.parametrize(("to", "dtype"), [("meta", torch.bfloat16), ("hf", "bfloat16")])
def test_dtype_is_converted_as_asked(tmp_path: Path, to: str, dtype: str | torch.dtype) -> None:
    source = write_checkpoint(tmp_path / "meta")
    convert(source, tmp_path / "half", to, dtype=dtype)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(tmp_path / "half")
    expected = read_shard(source / "consolidated.00.pth")
    for name, stored in checkpoint.tensors.items():
        assert torch.equal(stored.read(), expected[name].bfloat16())
    llama = Llama.build(tmp_path / "half", device="cpu", dtype="auto")
    assert {p.dtype for p in llama.model.parameters()} == {torch.bfloat16}


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(LlamaError) as error:
        convert(*arguments, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "meta")
    assert "mp_size is 3" in refusal(source, tmp_path / "x", "meta", 3)
    assert "dtype 'int3' is not known: expected bfloat16" in refusal(source, tmp_path / "x", "hf", dtype="int3")
    assert "can be divided over 1, 2, 4, 8 ranks" in refusal(source, tmp_path / "x", "meta", 3)
    assert "isn't divided over ranks" in refusal(source, tmp_path / "x", "hf", 2)
    assert "meta is the source itself, which isn't written over" in refusal(source, source, "hf", force=True)
    assert "is the source itself" in refusal(source, tmp_path / "x" / ".." / "meta", "hf")
    assert "lie in each other" in refusal(source, source / "hf", "hf")
    assert "lie in each other" in refusal(source, tmp_path, "hf", force=True)
    (tmp_path / "file").touch()
    assert "is a file" in refusal(source, tmp_path / "file", "hf")
    params = {**json.loads((source / "params.json").read_text()), "rope_scaling": {"type": "linear", "factor": 2}}
    (source / "params.json").write_text(json.dumps({**params, "sliding_window": 8}))
    convert(source, tmp_path / "mistral", "hf")
    assert json.loads((tmp_path / "mistral" / "config.json").read_text())["model_type"] == "mistral"
    biased = write_checkpoint(tmp_path / "biased", replace(ARGS, mlp_bias=True, sliding_window=8))
    assert "no family of Hugging Face's" in refusal(biased, tmp_path / "x", "hf")
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten_unless_forced(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "meta")
    target = tmp_path / "out"
    convert(source, target, "meta", 4)
    (target / "notes.txt").write_text("mine")
    assert "isn't empty" in refusal(source, target, "hf")
    assert open_checkpoint(target).format.name == "meta"
    convert(source, target, "hf", force=True)
    assert open_checkpoint(target).format.name == "hf"
    assert not list(target.glob("consolidated.*"))
    convert(source, target, "meta", 2, force=True)
    assert [len(list(target.glob(p))) for p in ("consolidated.*.pth", "*.safetensors")] == [2, 0]
    assert (target / "notes.txt").read_text() == "mine"


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Raise KeyboardInterrupt after so many files were moved to a directory."""
    move = os.replace

    def interrupt(target: Path, moved: int) -> None:
        left = iter(range(moved))

        def interrupted(a: object, b: object) -> None:
            if Path(str(b)).parent == target and next(left, None) is None:
                raise KeyboardInterrupt
            move(a, b)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "replace", interrupted)

    return interrupt


@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("to", ["meta", "hf"])
def test_an_interrupted_run_leaves_nothing_that_loads(
    tmp_path: Path, interrupt: Callable[[Path, int], None], to: str, moved: int
) -> None:
    """Over an older checkpoint."""
    source = write_checkpoint(tmp_path / "meta")
    target = tmp_path / "out"
    convert(source, target, "hf" if to == "meta" else "meta", force=True)
    interrupt(target, moved)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, to, force=True)  # type: ignore[arg-type]
    assert not list(target.glob("*.partial*")) and not (target / "config.json").exists()
    assert not (target / "params.json").exists()
    with pytest.raises(LlamaError):
        open_checkpoint(target)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_run_into_a_new_directory_leaves_none(
    tmp_path: Path, interrupt: Callable[[Path, int], None], moved: int
) -> None:
    source = write_checkpoint(tmp_path / "meta")
    interrupt(tmp_path / "out", moved)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    source, target = write_checkpoint(tmp_path / "meta"), tmp_path / "out"
    (target / ".partial-killed").mkdir(parents=True)
    (target / ".partial-killed" / "model.safetensors").touch()
    assert "isn't empty" in refusal(source, target, "hf")
    convert(source, target, "hf", force=True)
    assert not list(target.glob(".partial-*"))


def test_a_failure_in_a_new_directory_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "meta")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LlamaError, match="No space left"):
        convert(source, tmp_path / "out", "meta")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    source, target = write_checkpoint(tmp_path / "meta"), tmp_path / "out"
    command = ("-m", "llama", "convert", str(source), str(target), "--to", "meta", "--mp_size", "2", "--dtype", "fp16")
    done = run_program(*command)
    assert (done.returncode, done.stderr) == (0, "")
    files = "consolidated.00.pth, consolidated.01.pth, params.json, tokenizer.model"
    assert done.stdout == f"wrote {target}: {files}\n"
    again = run_program(*command)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: {target} isn't empty")
    assert run_program(*command, "--force").returncode == 0
    assert {stored.dtype for stored in open_checkpoint(target).tensors.values()} == {torch.float16}
