"""Texts of answers: a prompt's text and its answer's, joined, are all their tokens decoded together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_checkpoint
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from llama import Llama
from llama.model import ModelArgs, Transformer
from llama.parallel import Place
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.texts import decode_after, name_tokens, read_content
from llama.tokenizer import Tokenizer

WORDS = ("▁the", "▁sea", "▁is", "▁blue", "the", "sea", "blue")
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endfor %}"


def sentencepiece(first: bool = False) -> Library:
    """As Llama 2's, with tokens of bytes. first: as newer conversions write it, with Metaspace."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz.[]/INST",
    ]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = []
    for word in WORDS:
        made = word[0]
        for letter in word[1:]:
            if made + letter not in vocab:
                vocab[made + letter] = len(vocab)
                merges.append((made, letter))
            made += letter
    library = Library(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if first:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens([AddedToken(name, normalized=False) for name in names[:3]])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def unigram() -> Library:
    pieces = ["<unk>", "<s>", "</s>", "▁", *WORDS, *"abcdefghijklmnopqrstuvwxyz.[]/INST"]
    library = Library(models.Unigram([(piece, -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def byte_level() -> Library:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    return library


def word_level() -> Library:
    words = ["<unk>", "<s>", "</s>", *(word.lstrip("▁") for word in WORDS)]
    library = Library(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


LIBRARIES: dict[str, Callable[[], Library]] = {
    "sentencepiece": sentencepiece,
    "sentencepiece, newer": lambda: sentencepiece(first=True),
    "unigram": unigram,
    "bytes": byte_level,
    "words": word_level,
}


def make(folder: Path, library: Library) -> Llama:
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = HFTokenizer(folder / "tokenizer.json")
    args = ModelArgs(32, 1, 4, vocab_size=tokenizer.n_words, multiple_of=16, max_seq_len=64, max_batch_size=4)
    return Llama(Transformer(args), tokenizer)


@pytest.fixture(scope="module", params=LIBRARIES)
def case(
    request: pytest.FixtureRequest, place: Place, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Llama, Library]:
    library = LIBRARIES[request.param]()
    return make(tmp_path_factory.mktemp("texts"), library), library


@pytest.fixture(scope="module")
def llama(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return make(tmp_path_factory.mktemp("sentencepiece"), sentencepiece())


def answer_with(tokens: list[int], prompt: list[int]) -> dict[str, Any]:
    """Settings with which the model answers `prompt` by `tokens`."""

    def force(so_far: Any, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e4)
        forced[tokens[min(len(so_far) - len(prompt), len(tokens) - 1)]] = 0
        return forced

    return {"logits_processor": force, "temperature": 0, "max_gen_len": len(tokens)}


def ids_of(llama: Llama, *words: str) -> list[int]:
    return [token for word in words for token in llama.tokenizer.encode(word, bos=False, eos=False)]


# --- the seam ---------------------------------------------------------------------------------------------------------


def test_prompt_and_answer_are_all_tokens_decoded_together(case: tuple[Llama, Library]) -> None:
    llama, library = case
    prompt = "the sea is"
    prompt_tokens = llama.tokenizer.encode(prompt, bos=True, eos=False)
    ids, answer = ids_of(llama, prompt), ids_of(llama, "blue the")
    whole = library.decode(ids + answer, skip_special_tokens=False)
    assert whole.startswith(prompt) and library.decode(prompt_tokens + answer, skip_special_tokens=True) == whole
    settings = answer_with(answer, prompt_tokens)
    (echoed,) = llama.text_completion([prompt], echo=True, **settings)
    (plain,) = llama.text_completion([prompt], **settings)
    assert echoed["generation"] == whole == prompt + plain["generation"]
    steps = [step for steps in llama.stream([prompt_tokens], echo=True, **settings) for step in steps]
    assert "".join(step.text for step in steps) == library.decode(prompt_tokens + answer, skip_special_tokens=False)
    steps = [step for steps in llama.stream([prompt_tokens], **settings) for step in steps]
    assert prompt + "".join(step.text for step in steps) == whole
    assert prompt + decode_after(llama.tokenizer, prompt_tokens, answer) == whole


def test_beams_have_the_space_too(case: tuple[Llama, Library]) -> None:
    llama, _ = case
    prompt = llama.tokenizer.encode("the sea", bos=True, eos=False)
    for beam in llama.complete([prompt], 4, 0, num_beams=2):
        assert llama.tokenizer.decode(prompt) + beam.text == llama.tokenizer.decode(prompt + beam.tokens)


def test_a_character_at_the_seam_is_the_answers(place: Place, tmp_path: Path) -> None:
    for llama in (Llama.build(write_checkpoint(tmp_path / "meta"), device="cpu"), make(tmp_path, byte_level())):
        ids = ids_of(llama, "a東b")
        for cut in range(1, len(ids)):
            settings = answer_with(ids[cut:], ids[:cut])
            steps = [step for steps in llama.stream([ids[:cut]], echo=True, **settings) for step in steps]
            assert "".join(step.text for step in steps) == "a東b"
            (one,) = llama.complete([ids[:cut]], **settings)
            assert ("a東b").endswith(one.text) and (one.text == "b") == (cut == 4)


# --- stops ------------------------------------------------------------------------------------------------------------


def test_a_stop_that_a_prompts_cut_character_begins_is_met(tmp_path: Path) -> None:
    llama = Llama.build(write_checkpoint(tmp_path), max_seq_len=32, device="cpu", dtype="float32")
    first, *rest = llama.tokenizer.encode("漢b", bos=False, eos=False)
    (completion,) = llama.complete([[65, first]], **answer_with(rest, [65, first]), stop=["漢"])
    assert (completion.finish_reason, completion.stop, completion.text, completion.tokens) == ("stop", "漢", "", [])


@pytest.mark.parametrize(("stop", "text", "count"), [(" blue", "", 0), (" the", " blue", 1), ("e t", " blu", 0)])
def test_a_stop_that_begins_with_a_space_is_met(llama: Llama, stop: str, text: str, count: int) -> None:
    prompt = llama.tokenizer.encode("the sea is", bos=True, eos=False)
    answer = ids_of(llama, "blue the")
    (one,) = llama.complete([prompt], stop=[stop], **answer_with(answer, prompt))
    assert (one.text, one.stop, one.finish_reason, len(one.tokens)) == (text, stop, "stop", count)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_the_content_of_a_message_is_without_it(case: tuple[Llama, Library]) -> None:
    llama, library = case
    dialog = [{"role": "user", "content": "the sea"}]
    prompt = llama.formatter.encode_dialog_prompt(dialog)  # type: ignore[arg-type]
    answer = ids_of(llama, "blue the")
    (one,) = llama.chat_completion([dialog], **answer_with(answer, prompt))  # type: ignore[list-item]
    assert one["generation"]["content"] == library.decode(answer) == "blue the"


def test_only_the_tokenizers_own_space_is_taken_off(llama: Llama, small: Tokenizer) -> None:
    assert [read_content(llama.tokenizer, text) for text in ("  blue", "blue", "", " ")] == [" blue", "blue", "", ""]
    assert read_content(small, " blue") == " blue"


# --- single tokens ----------------------------------------------------------------------------------------------------


def test_texts_of_single_tokens_keep_their_space(llama: Llama) -> None:
    prompt = llama.tokenizer.encode("the sea", bos=True, eos=False)
    answer = ids_of(llama, "is blue")
    (one,) = llama.text_completion(["the sea"], logprobs=True, **answer_with(answer, prompt))
    assert one["tokens"] == [" is", " blue"] and "".join(one["tokens"]) == one["generation"]
    (one,) = llama.text_completion(["the sea"], logprobs=True, echo=True, **answer_with(answer, prompt))
    assert one["tokens"] == ["<s>", " the", " sea", " is", " blue"]


def test_no_token_is_lost_from_the_likeliest(case: tuple[Llama, Library]) -> None:
    llama, _ = case
    count = llama.tokenizer.n_words
    prompt = llama.tokenizer.encode("the", bos=True, eos=False)
    settings = answer_with([4], prompt) | {"logprobs": True, "top_logprobs": count}
    (one,) = llama.text_completion(["the"], **settings)
    (same,) = llama.complete([prompt], **settings)
    (by_text,), (by_id,) = one["top_logprobs"], one["top_tokens"]
    assert {token["id"] for token in by_id} == {*range(count)} and len(by_text) == count
    assert [(token["id"], token["logprob"]) for token in by_id] == list(same.top_logprobs[0])  # type: ignore[index]
    assert [*by_text.values()] == [token["logprob"] for token in by_id]
    for token in by_id:  # the likeliest of each text has it as its key
        assert by_text[token["text"]] >= token["logprob"]


def test_of_like_texts_the_later_ones_have_their_ids(llama: Llama) -> None:
    tokenizer = llama.tokenizer
    assert isinstance(tokenizer, HFTokenizer)
    (letter,), byte, other = ids_of(llama, "a")[1:], 3 + ord("a"), 3 + 0xE6
    named = name_tokens(tokenizer, [(byte, -1.0), (letter, -2.0), (other, -3.0), (other + 1, -4.0)])
    assert named == {"a": -1.0, f"a (token {letter})": -2.0, "\ufffd": -3.0, f"\ufffd (token {other + 1})": -4.0}
