"""Every form of LoRA that peft writes: logits as peft's, merged into a Llama, on a TaskModel, saved and read anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close
from peft_models import IDS, WORDS, Made, change_config, change_tensors, make_adapter, reload_logits, write_base
from torch import Tensor

from llama import Llama, LlamaError, TaskModel, load_adapter, save_adapter
from llama.adapters.lora import merge_lora
from llama.adapters.opening import open_adapted
from llama.checkpoints.convert import convert
from llama.parallel import Place

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BIASED = {"attention_bias": True, "mlp_bias": True}
QWEN = {"kind": "Qwen2", "use_sliding_window": False}

# What LoraConfig is given, and after a bar what the base is, where it isn't plain.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a regex of targets": ({"target_modules": r"model\.layers\.[01]\.(self_attn\.(q|k)_proj|mlp\.up_proj)"}, {}),
    "a regex without the body": ({"target_modules": r".*\.1\.mlp\.(gate|down)_proj"}, {}),
    "all-linear": ({"target_modules": "all-linear"}, {}),
    "names of other models among the targets": ({"target_modules": ["k_proj", "query_key_value", "fc1"]}, {}),
    "layers by number": ({"layers_to_transform": [1]}, {}),
    "one layer, by the name of the list": ({"layers_to_transform": 0, "layers_pattern": "layers"}, {}),
    "layers by a regex of the list": ({"layers_to_transform": [0], "layers_pattern": ["(layers|h)"]}, {}),
    "excluded by a regex": ({"target_modules": EVERY, "exclude_modules": r".*0\.(mlp|self_attn)\..*"}, {}),
    "excluded by names": (
        {"target_modules": EVERY, "exclude_modules": ["down_proj", "model.layers.1.mlp.up_proj"]},
        {},
    ),
    "sizes by regex": (
        {
            "target_modules": EVERY,
            "rank_pattern": {r"layers\.1\..*(q|o)_proj": 2, r"^model\.layers\.\d\.mlp\.down_proj": 6},
            "alpha_pattern": {r".*(k|v)_proj": 20, "mlp.up_proj": 1},
        },
        {},
    ),
    "rank-stabilized, by patterns": ({"use_rslora": True, "rank_pattern": {"v_pro.": 9}}, {}),
    "dora": ({"target_modules": EVERY, "use_dora": True}, {}),
    "dora on biased layers": ({"target_modules": EVERY, "use_dora": True, "use_rslora": True}, BIASED),
    "dora on the output": ({"target_modules": ["k_proj", "lm_head"], "use_dora": True}, {}),
    "dora on the embedding": ({"target_modules": ["k_proj", "embed_tokens"], "use_dora": True}, {}),
    "biases of its own": ({"target_modules": EVERY, "lora_bias": True}, BIASED),
    "biases of its own, on layers without": ({"target_modules": ["q_proj", "up_proj"], "lora_bias": True}, {}),
    "biases of its own, on the output projection": ({"target_modules": ["o_proj"], "lora_bias": True}, QWEN),
    "all biases trained": ({"target_modules": EVERY, "bias": "all"}, BIASED),
    "biases of its layers trained": ({"target_modules": ["k_proj", "up_proj"], "bias": "lora_only"}, BIASED),
    "biases of Qwen trained": ({"bias": "all"}, QWEN),
    "the embedding": ({"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}, {}),
    "the embedding alone": ({"target_modules": ["embed_tokens"], "rank_pattern": {"embed.*": 3}}, {}),
    "the embedding, by regex": ({"target_modules": r".*(embed_tokens|down_proj)"}, {}),
    "the embedding and the output": ({"target_modules": ["embed_tokens", "lm_head", "v_proj"]}, {}),
    "the output saved": ({"modules_to_save": ["lm_head"]}, {}),
    "embedding and output saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "norms saved": ({"modules_to_save": ["input_layernorm", "norm"]}, {}),
    "norms of heads saved": ({"modules_to_save": ["q_norm", "k_norm"]}, {"kind": "Qwen3", "head_dim": 8}),
    "a part of a layer saved": ({"modules_to_save": ["layers.1.mlp"], "target_modules": EVERY}, {}),
    "a rotated matrix saved": ({"modules_to_save": ["k_proj"]}, {}),
    "embeddings written along": ({"save": {"save_embedding_layers": True}}, {}),
    "tokens": ({"trainable_token_indices": [5, 3]}, {}),
    "tokens of both matrices": ({"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7]}}, {}),
    "pissa": ({"target_modules": EVERY, "init_lora_weights": "pissa"}, {}),
    "pissa, rank-stabilized": ({"init_lora_weights": "pissa", "use_rslora": True}, {}),
    "pissa and dora": ({"init_lora_weights": "pissa", "use_dora": True}, {}),
    "olora": ({"target_modules": EVERY, "init_lora_weights": "olora"}, {}),
    "olora, rank-stabilized": ({"init_lora_weights": "olora", "use_rslora": True, "lora_alpha": 2}, {}),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}),
    "eva": ({"init_lora_weights": "eva"}, {}),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}),
    "mica": ({"init_lora_weights": "mica"}, {}),
    "velora": ({"velora_config": {"num_groups": 4}}, {}),
    "mistral": ({"target_modules": EVERY}, {"kind": "Mistral"}),
}
TIED: dict[str, dict[str, Any]] = {
    "tied, all-linear": {"target_modules": "all-linear"},
    "tied, the embedding saved": {"modules_to_save": ["embed_tokens"]},
    "tied, the output saved": {"modules_to_save": ["lm_head"]},
    "tied, both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied, both saved as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied, the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tied, the output": {"target_modules": ["q_proj", "lm_head"]},
    "tied, both by one adapter": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied, tokens": {"trainable_token_indices": [5, 3]},
    "tied, tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 3]}},
    "tied, other tokens of each": {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7]}},
    "tied, tokens of the output": {"trainable_token_indices": {"lm_head": [7]}},
    "tied, written along": {"save": {"save_embedding_layers": True}},
    "tied, more words": {"resize": 8},
    "tied, more words, the embedding saved": {"resize": 8, "modules_to_save": ["embed_tokens"]},
    "tied, more words, the embedding": {"resize": 8, "target_modules": ["embed_tokens"]},
}
GROWN: dict[str, dict[str, Any]] = {
    "more words": {"resize": 8},
    "more words, both saved": {"resize": 8, "modules_to_save": ["embed_tokens", "lm_head"]},
    "more words, their tokens": {"resize": 8, "trainable_token_indices": [*range(512, 520)]},
    "more words, both": {"resize": 8, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "fewer words": {"resize": -16, "modules_to_save": ["embed_tokens", "lm_head"]},
}
ALL = {**FORMS, **{name: (form, {"tie_word_embeddings": True}) for name, form in TIED.items()}}
ALL |= {name: (form, {}) for name, form in GROWN.items()}
NEEDS_OTHER_SIZES = {*GROWN, *TIED} - {
    "tied, all-linear",
    "tied, both saved as one",
    "tied, tokens",
    "tied, tokens of both",
}
NEEDS_OTHER_SIZES -= {"tied, written along"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture(scope="module")
def made(place: Place, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the base of a form, the adapter that peft has made), each made once."""
    adapters: dict[str, tuple[Path, Made]] = {}

    def make(form: str) -> tuple[Path, Made]:
        options, settings = ALL[form]
        key = repr(settings)
        if key not in bases:
            bases[key] = write_base(tmp_path_factory.mktemp("base"), **settings)
        if form not in adapters:
            adapters[form] = bases[key], make_adapter(bases[key], tmp_path_factory.mktemp("adapter"), **options)
        return adapters[form]

    return make


def build(base: Path, adapter: Path | None = None, **options: Any) -> Llama:
    return Llama.build(base, adapter_dir=adapter, device="cpu", dtype="float32", **options)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model.model(IDS)


@pytest.fixture(autouse=True)
def any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of other numbers of words than the tokenizer's: ids alone are compared here."""
    for module in ("llama.checkpoints.loader", "llama.tasks.model"):
        monkeypatch.setattr(f"{module}.check_vocabulary", lambda args, tokenizer: None)


@pytest.mark.parametrize("form", ALL)
def test_logits_are_pefts(made: Any, form: str) -> None:
    """Merged while loading, and with A and B kept on the layers."""
    base, adapter = made(form)
    share = 1e-4 if "pissa" in form else 2e-5  # a singular value decomposition has an error of its own
    assert_close(logits_of(build(base, adapter.directory)), adapter.logits, share)
    task = TaskModel.build(base, adapter_dir=adapter.directory, device="cpu", dtype="float32")
    assert_close(logits_of(task), adapter.logits, share)
    if adapter.logits.shape[-1] == WORDS:
        with pytest.raises(AssertionError):
            assert_close(logits_of(build(base)), adapter.logits, 1e-3)


IN_MEMORY = ["sizes by regex", "dora", "biases of its own", "the embedding", "tokens", "olora", "norms of heads saved"]
OTHERS = sorted(ALL.keys() - NEEDS_OTHER_SIZES - {*IN_MEMORY})


@pytest.mark.parametrize("form", [*IN_MEMORY, *(pytest.param(form, marks=pytest.mark.slow) for form in OTHERS)])
def test_a_model_in_memory_takes_it_and_writes_it(made: Any, form: str, tmp_path: Path) -> None:
    base, adapter = made(form)
    model = build(base).model
    load_adapter(model, adapter.directory)
    share = 1e-4 if "pissa" in form else 2e-5
    with torch.no_grad():
        assert_close(model(IDS), adapter.logits, share)
        assert_close(model(IDS, 0), adapter.logits, share)  # in its fast form, where there is one
    if form == "the embedding alone":
        return  # no layer holds what was loaded
    save_adapter(model, tmp_path / "ours")
    assert_close(reload_logits(base, tmp_path / "ours"), adapter.logits, share)
    if form.startswith("biases of its own, on"):
        with pytest.raises(LlamaError, match=r"has no bias that the adapter's .lora_bias. could be added to"):
            merge_lora(model)
        return
    merge_lora(model)
    with torch.no_grad():
        assert_close(model(IDS), adapter.logits, share)
        assert_close(model(IDS, 0), adapter.logits, share)


@pytest.mark.parametrize("form", sorted(NEEDS_OTHER_SIZES))
def test_a_model_in_memory_of_other_sizes_says_what_to_do(made: Any, form: str) -> None:
    base, adapter = made(form)
    model = build(base).model
    before = logits_of(build(base))
    with pytest.raises(LlamaError, match=r"(number of words|embedding or the output layer alone).*adapter_dir="):
        load_adapter(model, adapter.directory)
    with torch.no_grad():
        assert torch.equal(model(IDS), before)


@pytest.mark.parametrize(
    "form", ["dora", "biases of its own, on layers without", "tied, the embedding", "more words", "pissa"]
)
def test_a_saved_model_is_the_same(made: Any, form: str, tmp_path: Path) -> None:
    """What a TaskModel writes, and what convert writes, in both formats; transformers reads it too."""
    import transformers

    base, adapter = made(form)
    TaskModel.build(base, adapter_dir=adapter.directory, device="cpu", dtype="float32").save(tmp_path / "saved")
    convert(open_adapted(base, adapter.directory), tmp_path / "hf", "hf")
    convert(open_adapted(base, adapter.directory), tmp_path / "meta", "meta", mp_size=2)
    for name in ("saved", "hf", "meta"):
        assert_close(logits_of(build(tmp_path / name)), adapter.logits)
    for name in ("saved", "hf"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            assert_close(theirs(input_ids=IDS, use_cache=False).logits, adapter.logits)


def test_the_first_of_several_patterns_counts(made: Any, tmp_path: Path) -> None:
    """In the order of the file, which peft sorts when it writes it."""
    base, _ = made("gaussian")
    patterns = {".*proj": 3, "v_proj": 30, "zzz|.*q_proj": 40}
    adapter = make_adapter(base, tmp_path / "adapter", alpha_pattern=patterns)
    expected = reload_logits(base, adapter.directory)
    assert_close(logits_of(build(base, adapter.directory)), expected)
    change_config(adapter.directory, alpha_pattern=dict(reversed(patterns.items())))
    assert_close(logits_of(build(base, adapter.directory)), reload_logits(base, adapter.directory))
    with pytest.raises(AssertionError):
        assert_close(logits_of(build(base, adapter.directory)), expected, 1e-2)


def test_a_base_that_was_trained_takes_the_bases_place(made: Any, tmp_path: Path) -> None:
    """peft writes the matrix below an adapter of the output layer, and reads it: it may be another than the base's."""
    base, _ = made("dora on the output")
    key = "base_model.model.lm_head.base_layer.weight"
    other = make_adapter(base, tmp_path / "other", target_modules=["k_proj", "lm_head"])
    change_tensors(other.directory, lambda tensors: tensors.update({key: tensors[key] + 0.1 * torch.randn(512, 32)}))
    expected = reload_logits(base, other.directory)
    assert_close(logits_of(build(base, other.directory)), expected)
    with pytest.raises(AssertionError):
        assert_close(other.logits, expected, 1e-2)


def test_a_dora_adapter_trains_as_pefts(place: Place, tmp_path: Path) -> None:
    """Gradients of A, B and the magnitudes."""
    import peft
    import transformers

    base = write_base(tmp_path / "base", **BIASED)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj", "up_proj", "v_proj"], use_dora=True)
    model = build(base).model
    load_adapter(model, adapter.directory)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter.directory, is_trainable=True
    ).eval()
    model(IDS).logsumexp(-1).sum().backward()
    theirs(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    names = {"attention.wo": "self_attn.o_proj", "feed_forward.w3": "mlp.up_proj", "attention.wv": "self_attn.v_proj"}
    for ours, hf in names.items():
        layer = model.get_submodule(f"layers.1.{ours}")
        twin = theirs.base_model.model.model.layers[1].get_submodule(hf)
        for actual, expected in (
            (layer.lora_A, twin.lora_A.default.weight),
            (layer.lora_B, twin.lora_B.default.weight),
            (layer.lora_magnitude, twin.lora_magnitude_vector.default.weight),
        ):
            assert_close(actual.grad, expected.grad)


def test_a_pattern_without_an_end_is_refused_in_time(made: Any, tmp_path: Path) -> None:
    base, _ = made("gaussian")
    adapter = make_adapter(base, tmp_path / "adapter")
    change_config(adapter.directory, target_modules=r"((([a-z_0-9.]+)+)+)+!")
    with pytest.raises(LlamaError, match=r"target_modules has .*which can't be matched .*it takes over 1 s"):
        build(base, adapter.directory)
