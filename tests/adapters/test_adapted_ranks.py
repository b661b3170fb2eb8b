"""Adapters of every kind on several ranks are those of one process and of peft: logits, gradients, files."""

from pathlib import Path
from typing import Any

import adapted_program
import pytest
from conftest import assert_close
from peft_models import make_adapter, reload_logits, write_base
from rank_pool import RankPool
from safetensors.torch import load_file

from llama.parallel import Place

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
# (base, adapter, whether a model in memory can take it)
FORMS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    (BIASED, {"target_modules": EVERY, "use_dora": True}, True),
    (BIASED, {"target_modules": EVERY[:-1], "lora_bias": True, "modules_to_save": ["norm", "embed_tokens"]}, True),
    (BIASED, {"target_modules": ["embed_tokens", "k_proj", "o_proj"], "use_dora": True, "bias": "all"}, True),
    (BIASED, {"target_modules": EVERY, "init_lora_weights": "olora", "trainable_token_indices": [300, 4]}, True),
    ({}, {"target_modules": EVERY[:-1], "init_lora_weights": "pissa", "lora_dropout": 0.1}, True),
    ({}, {"target_modules": ["q_proj", "o_proj", "up_proj"], "lora_bias": True}, True),
    ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "down_proj"]}, False),
    ({"tie_word_embeddings": True}, {"target_modules": ["lm_head"], "use_dora": True}, False),
]


@pytest.mark.parametrize(
    ("ranks", "forms"),
    [
        pytest.param(2, [FORMS[0], FORMS[6]], id="2 ranks"),
        pytest.param(2, FORMS, id="2 ranks, all", marks=pytest.mark.slow),
        pytest.param(4, FORMS, id="4 ranks, all", marks=pytest.mark.slow),
    ],
)
def test_ranks_agree(pool: RankPool, place: Place, tmp_path: Path, ranks: int, forms: list[Any]) -> None:
    """4 ranks share 2 key/value heads."""
    bases = {repr(base): write_base(tmp_path / f"base{i}", **base) for i, (base, _, _) in enumerate(forms)}
    made = [make_adapter(bases[repr(b)], tmp_path / f"a{i}", **options) for i, (b, options, _) in enumerate(forms)]
    jobs = [(str(bases[repr(b)]), str(one.directory), fits) for (b, _, fits), one in zip(forms, made, strict=True)]
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    (one,) = pool.run(adapted_program.compute, jobs, str(tmp_path / "one")).results
    two = pool.run(adapted_program.compute, jobs, str(tmp_path / "two"), ranks=ranks).results
    for i, adapter in enumerate(made):
        share = 1e-4 if "pissa" in forms[i][1].values() else 2e-5  # the decomposition has an error of its own
        for results in (one, *two):
            for name in {"merged", "apart", "loaded", "cached"} & results[i].keys():
                assert_close(results[i][name], adapter.logits, share)
            assert_close(results[i]["quantized"], adapter.logits, 0.1)
            assert results[i].keys() == one[i].keys()
            for name in results[i].keys() - {"quantized"}:
                assert_close(results[i][name], one[i][name])
        saved = [load_file(tmp_path / folder / f"saved{i}" / "model.safetensors") for folder in ("one", "two")]
        assert saved[0].keys() == saved[1].keys()
        for name in saved[0]:
            assert_close(saved[1][name], saved[0][name], 1e-5)
        if jobs[i][2]:
            assert_close(reload_logits(Path(jobs[i][0]), tmp_path / "two" / f"adapter{i}"), adapter.logits, share)
