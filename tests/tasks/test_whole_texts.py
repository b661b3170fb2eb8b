"""What a tokenizer puts around a text is read by every task, and dialogs can be given for texts; as in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_checkpoint
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from llama import Llama
from llama.errors import LlamaError
from llama.tasks.model import TaskModel
from llama.tokenization.inputs import encode_inputs
from llama.training.preprocessing import Preprocessor, read_classify, read_tag

TEXT = "the sea is blue"
TEXTS = [TEXT, "the sky", "a"]
# name -> (of a text, of a pair), in the language of tokenizers' TemplateProcessing
AROUND = {
    "end": ("$A </s>", "$A </s> $B </s>"),
    "both": ("<s> $A </s>", "<s> $A $B </s>"),
    "begin": ("<s> $A", "<s> $A <s> $B"),
    "begin, one of a pair": ("<s> $A", "<s> $A $B"),
    "several": ("<s> <x> $A </s> <x>", "<s> $A </s> </s> $B <x>"),
    "none": ("$A", "$A $B"),
    "as RoBERTa's": ("$A", "$A $B"),  # these two are in code
    "as BERT's, after others": ("$A", "$A $B"),
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<x>' + message.role + ':' + message.content + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<x>assistant:' }}{% endif %}"
)
DIALOG: Any = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "blue</s>"}]


def write_tokenizer(folder: Path, around: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", "<x>")])
    single, pair = AROUND[around]
    ids = [(name, made.token_to_id(name)) for name in ("<s>", "</s>", "<x>")]
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    if around == "as RoBERTa's":
        made.post_processor = processors.RobertaProcessing(ids[1], ids[0], trim_offsets=True)
    if around == "as BERT's, after others":
        last = processors.BertProcessing(ids[1], ids[0])
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), last])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return fast


def write_model(folder: Path, name: str, **config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    made = transformers.LlamaConfig(vocab_size=280, **sizes, **heads, initializer_range=0.3, **config)
    model = getattr(transformers, name)(made).eval()
    model.save_pretrained(folder)
    return model


BUILD: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seq_len": 64}


@pytest.mark.parametrize("around", AROUND)
@torch.no_grad()
def test_vectors_and_scores_are_of_the_whole_text(tmp_path: Path, around: str) -> None:
    theirs, tokenizer = write_model(tmp_path, "LlamaForCausalLM"), write_tokenizer(tmp_path, around)
    llama = Llama.build(tmp_path, **BUILD)
    last, mean, scores = llama.embed(TEXTS), llama.embed(TEXTS, "mean"), llama.score(TEXTS)
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text).input_ids
        hidden = theirs.model(torch.tensor([ids])).last_hidden_state[0]
        logprobs = theirs.lm_head(hidden).log_softmax(-1)
        assert scores[i].tokens == ids
        torch.testing.assert_close(last[i], hidden[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mean[i], hidden.mean(0), atol=1e-4, rtol=1e-4)
        expected = [0.0, *(float(logprobs[j, token]) for j, token in enumerate(ids[1:]))]
        assert scores[i].logprobs == pytest.approx(expected, abs=1e-4)
    # A prompt is no whole text: its answer follows.
    assert (
        llama.complete([llama.tokenizer.encode(TEXT, bos=True, eos=False)], 1)[0].prompt[-1] != tokenizer.eos_token_id
    )


@pytest.mark.parametrize("around", ["end", "several"])
@torch.no_grad()
def test_labels_are_of_the_whole_text(tmp_path: Path, around: str) -> None:
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    theirs = write_model(tmp_path, "LlamaForSequenceClassification", **labels)
    tokenizer = write_tokenizer(tmp_path, around)
    model = TaskModel.build(tmp_path, **BUILD)
    rows = [tokenizer(text).input_ids for text in TEXTS]
    for (label,), ids in zip(model.classify(TEXTS), rows, strict=True):
        chances = theirs(torch.tensor([ids])).logits[0].softmax(-1)
        assert label.label == "abc"[int(chances.argmax())] and label.score == pytest.approx(
            float(chances.max()), abs=1e-4
        )
    preprocessor = Preprocessor(model.tokenizer, model.formatter, {"a": 0, "b": 1, "c": 2}, 64)
    assert read_classify(preprocessor, {"text": TEXT, "label": "a"})[0].tokens == rows[0]


@pytest.mark.parametrize("around", ["end", "several"])
@torch.no_grad()
def test_tags_are_of_the_whole_text(tmp_path: Path, around: str) -> None:
    classes = ["O", "B-x", "I-x"]
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    theirs = write_model(tmp_path, "LlamaForTokenClassification", **labels)
    tokenizer = write_tokenizer(tmp_path, around)
    model = TaskModel.build(tmp_path, **BUILD)
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    best = theirs(torch.tensor([encoded.input_ids])).logits[0].argmax(-1).tolist()
    tagged = {i for label, (a, b) in zip(best, encoded.offset_mapping, strict=True) if label for i in range(a, b)}
    (spans,) = model.tag([TEXT], whole_words=False)
    ours = {i for span in spans for i in range(span.start, span.end)}
    assert {i for i in ours if TEXT[i] != " "} == {i for i in tagged if TEXT[i] != " "}
    preprocessor = Preprocessor(model.tokenizer, model.formatter, labels["label2id"], 64)
    (example,) = read_tag(preprocessor, {"text": TEXT, "spans": [{"start": 4, "end": 7, "label": "x"}]})
    assert example.tokens == encoded.input_ids and len(example.target) == len(example.tokens)
    sea = [i for i, (a, b) in enumerate(encoded.offset_mapping) if a < 7 and b > 4 and a < b]
    assert [i for i, label in enumerate(example.target) if label in (1, 2)] == sea


@pytest.mark.parametrize("around", AROUND)
@torch.no_grad()
def test_answers_are_of_the_whole_pair(tmp_path: Path, around: str) -> None:
    theirs, tokenizer = write_model(tmp_path, "LlamaForQuestionAnswering"), write_tokenizer(tmp_path, around)
    model = TaskModel.build(tmp_path, **BUILD)
    encoded = tokenizer("is it blue", TEXT, return_offsets_mapping=True)
    output = theirs(torch.tensor([encoded.input_ids]))
    places = [i for i, text in enumerate(encoded.sequence_ids()) if text == 1]
    spans = [(i, j) for i in places for j in places if i <= j]
    first, last = max(spans, key=lambda span: float(output.start_logits[0, span[0]] + output.end_logits[0, span[1]]))
    start, end = encoded.offset_mapping[first][0], encoded.offset_mapping[last][1]
    (answer,) = model.answer("is it blue", TEXT)
    assert answer.text == TEXT[start:end].strip()


# --- dialogs, and texts that are rendered already ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = tmp_path_factory.mktemp("both")
    write_model(folder, "LlamaForCausalLM")
    write_tokenizer(folder, "both")
    return Llama.build(folder, **BUILD)


PLAIN: Any = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "blue"}]


def test_a_dialog_is_what_its_template_writes(llama: Llama, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "both")
    expected = tokenizer.apply_chat_template(PLAIN, tokenize=True, return_dict=False)
    (scored, text) = llama.score([PLAIN, TEXT])
    assert scored.tokens == expected and text.tokens == tokenizer(TEXT).input_ids
    rendered = tokenizer.apply_chat_template(PLAIN, tokenize=False)
    # Rendered already, it has its control tokens where they are allowed, and none twice.
    (again,) = llama.score([rendered], allowed_special="all")
    assert again.tokens == expected
    (as_text,) = llama.score([rendered])
    assert len(as_text.tokens) > len(expected) + 10
    vectors = llama.embed([PLAIN, rendered], allowed_special={"<s>", "</s>", "<x>"})
    assert torch.equal(vectors[0], vectors[1])
    # Without them in the text, what is put around a text is put there.
    (bare,) = llama.score(["the<x>sea"], allowed_special="all")
    assert bare.tokens == tokenizer("the<x>sea").input_ids
    # What a user writes in a dialog stays text.
    (hostile,) = llama.score([DIALOG])
    assert hostile.tokens.count(tokenizer.eos_token_id) == 2


def test_a_dialog_in_metas_layout(tmp_path: Path) -> None:
    llama = Llama.build(write_checkpoint(tmp_path), device="cpu", max_seq_len=128)
    (scored,) = llama.score([PLAIN])
    special = llama.tokenizer.special_tokens
    assert scored.tokens == llama.formatter.encode_dialog_prompt(PLAIN)[: len(scored.tokens)]
    assert scored.tokens[0] == special["<|begin_of_text|>"] and scored.tokens[-1] == special["<|eot_id|>"]
    (text,) = llama.score(["<|begin_of_text|>hi<|eot_id|>"], allowed_special="all")
    assert text.tokens == [special["<|begin_of_text|>"], *b"hi", special["<|eot_id|>"]]


def test_a_classifier_takes_dialogs(tmp_path: Path) -> None:
    theirs = write_model(tmp_path, "LlamaForSequenceClassification", num_labels=1)  # as models of rewards have it
    tokenizer = write_tokenizer(tmp_path, "begin")
    model = TaskModel.build(tmp_path, problem_type="regression", **BUILD)
    ids = tokenizer.apply_chat_template(PLAIN, tokenize=True, return_dict=False)
    with torch.no_grad():
        expected = float(theirs(torch.tensor([ids])).logits)
    rendered = tokenizer.apply_chat_template(PLAIN, tokenize=False)
    ((dialog,), (text,)) = (model.classify([PLAIN])[0], model.classify([rendered], allowed_special="all")[0])
    assert dialog.score == pytest.approx(expected, abs=1e-4) == text.score


def test_what_is_neither_is_refused_by_its_place(llama: Llama) -> None:
    with pytest.raises(LlamaError, match=r"put the one dialog into a list, \[dialog\]"):
        llama.score(PLAIN)
    with pytest.raises(LlamaError, match="expected a list of strings, or of dialogs"):
        llama.embed([TEXT, 3])  # type: ignore[list-item]
    with pytest.raises(LlamaError, match="text 1: the dialog is empty"):
        llama.score([TEXT, []])
    with pytest.raises(LlamaError, match=r"text 1: message 1 of 1: .*role"):
        llama.score([TEXT, [{"content": "a"}]])  # type: ignore[list-item]
    with pytest.raises(LlamaError, match="text 1 is empty"):
        llama.score([TEXT, ""])
    with pytest.raises(LlamaError, match="allowed_special is the str '<s>'; expected 'all' or a set"):
        llama.score([TEXT], allowed_special="<s>")  # type: ignore[arg-type]
    with pytest.raises(LlamaError, match="text 0 is a dialog, and there is no formatter"):
        encode_inputs(llama.tokenizer, None, [PLAIN])


def test_a_separator_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForQuestionAnswering")
    write_tokenizer(tmp_path, "begin")
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append(values["added_tokens"][-1] | {"id": 280, "content": "<sep>"})
    values["model"]["vocab"] |= {f"word {i}": i for i in range(len(values["model"]["vocab"]), 277)}
    for i, token in enumerate(values["added_tokens"]):
        token["id"] = 277 + i
    separator = {"SpecialToken": {"id": "<sep>", "type_id": 0}}
    values["post_processor"]["special_tokens"]["<sep>"] = {"id": "<sep>", "ids": [280], "tokens": ["<sep>"]}
    values["post_processor"]["special_tokens"]["<s>"]["ids"] = [277]
    values["post_processor"]["pair"].insert(2, separator)
    path.write_text(json.dumps(values))
    model = TaskModel.build(tmp_path, **BUILD)
    with pytest.raises(LlamaError, match="the token '<sep>', whose id 280 the model of vocab_size 280 doesn't know"):
        model.answer("is it blue", TEXT)


def test_a_pair_in_another_order_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForQuestionAnswering")
    write_tokenizer(tmp_path, "none")
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["post_processor"]["pair"].reverse()
    path.write_text(json.dumps(values))
    model = TaskModel.build(tmp_path, **BUILD)
    with pytest.raises(LlamaError, match="second text of a pair before the first"):
        model.answer("is it blue", TEXT)
