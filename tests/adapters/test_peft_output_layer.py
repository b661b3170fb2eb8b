"""Adapters on the output layer, with all that peft may do to its matrix beside, and targets by full names."""

from pathlib import Path
from typing import Any

import pytest
from peft_models import IDS, make_adapter, reload_logits, write_base
from torch.testing import assert_close

from llama import Llama, LlamaError, TaskModel

BOTH = ["q_proj", "lm_head"]
FORMS: dict[str, dict[str, Any]] = {
    "pissa": {"target_modules": BOTH, "init_lora_weights": "pissa"},
    "olora": {"target_modules": BOTH, "init_lora_weights": "olora"},
    "tokens": {"target_modules": BOTH, "trainable_token_indices": [3, 4, 5, 400]},
    "pissa, the embedding saved": {
        "target_modules": BOTH,
        "init_lora_weights": "pissa",
        "modules_to_save": ["embed_tokens"],
    },
    "of one layer": {"target_modules": BOTH, "layers_to_transform": [1]},
    "a full name of another layer": {
        "target_modules": ["model.layers.0.mlp.up_proj", "v_proj"],
        "layers_to_transform": [1],
    },
}


@pytest.fixture(autouse=True)
def any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("llama.checkpoints.loader", "llama.tasks.model"):
        monkeypatch.setattr(f"{module}.check_vocabulary", lambda args, tokenizer: None)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_pefts(tmp_path: Path, form: str, is_tied: bool) -> None:
    """Merged while loading, and with A and B kept on the layers."""
    base = write_base(tmp_path / "base", tie_word_embeddings=is_tied)
    made = make_adapter(base, tmp_path / "adapter", **FORMS[form])
    expected = reload_logits(base, made.directory)
    share = float(expected.abs().max()) * 1e-4
    merged = Llama.build(base, adapter_dir=made.directory, max_seq_len=64, device="cpu", dtype="float32")
    task = TaskModel.build(base, adapter_dir=made.directory, device="cpu", dtype="float32")
    assert_close(merged.model(IDS), expected, rtol=0, atol=share)
    assert_close(task.model(IDS), expected, rtol=0, atol=share)


@pytest.mark.parametrize(
    ("options", "save"), [({"trainable_token_indices": [3]}, {}), ({}, {"save_embedding_layers": False})]
)
def test_a_tied_matrix_of_a_start_that_is_not_in_the_file_is_refused(
    tmp_path: Path, options: dict[str, Any], save: dict[str, Any]
) -> None:
    """peft changes the embedding too, and doesn't always write it."""
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    made = make_adapter(base, tmp_path / "adapter", save=save, **FORMS["pissa"], **options)
    with pytest.raises(LlamaError, match=r"lm_head\.base_layer\.weight.*save_embedding_layers=True"):
        Llama.build(base, adapter_dir=made.directory, max_seq_len=64, device="cpu", dtype="float32")
