"""The space that SentencePiece tokenizers put before every text: answers keep it, contents of messages don't."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Library

from llama import Llama
from llama.cli.batch import complete_file
from llama.cli.chat import talk
from llama.model import ModelArgs, Transformer
from llama.parallel import Place
from llama.tokenization.hf_tokenizer import HFTokenizer

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endfor %}"
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"seablu", "▁b", "▁bl", "▁blu"]
PIECES.append("▁blue")


@pytest.fixture(scope="module")
def llama(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    merges = [("▁", "b"), ("▁b", "l"), ("▁bl", "u"), ("▁blu", "e")]
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    library = Library(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens([AddedToken(name, normalized=False) for name in PIECES[:3]])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("sentencepiece")
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    args = ModelArgs(32, 1, 4, vocab_size=len(PIECES), multiple_of=16, max_seq_len=64, max_batch_size=2)
    model = Transformer(args)
    with torch.no_grad():
        model.output.weight.zero_()
    return Llama(model, HFTokenizer(folder / "tokenizer.json"))


BLUE: dict[str, Any] = {"temperature": 0.0, "max_gen_len": 2, "logit_bias": {PIECES.index("▁blue"): 100.0}}


def test_lines_of_a_file(llama: Llama, tmp_path: Path) -> None:
    lines = [{"prompt": "sea"}, {"messages": [{"role": "user", "content": "sea"}]}]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    complete_file(str(tmp_path / "in"), str(tmp_path / "out"), BLUE, 1, {}, False, lambda: llama)
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [record["generation"] for record in records] == [" blue blue", "blue blue"]


def test_a_chat(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "dialog.json"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"sea\n/save {saved}\n".encode())))
    talk(llama, None, BLUE)
    assert "\nblue blue\n" in "\n" + capsys.readouterr().out
    assert json.loads(saved.read_text())[-1] == {"role": "assistant", "content": "blue blue"}
