"""lm-evaluation-harness, unmodified, by its `local-completions`: tasks of its three kinds, made up here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running_server import Running

from llama.checkpoints.convert import convert
from llama.checkpoints.demo import demo_checkpoint

pytestmark = pytest.mark.lm_eval
ROWS = [{"country": "France", "answer": 0}, {"country": "Italy", "answer": 1}, {"country": "Spain", "answer": 2}]
CITIES = ["Paris", "Rome", "Madrid"]
ASKED = "The capital of {{country}} is"
TASKS: dict[str, dict[str, Any]] = {
    "capitals": {
        "output_type": "multiple_choice",
        "doc_to_text": ASKED,
        "doc_to_choice": CITIES,
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "said": {
        "output_type": "generate_until",
        "doc_to_text": ASKED,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolled": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": f"{ASKED} a city.",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def test_tasks_of_all_kinds(server: Running, tmp_path: Path) -> None:
    """What the harness reads is what the library computes."""
    convert(demo_checkpoint(), tmp_path / "hf", "hf")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))  # YAML includes JSON
    model = f"model=demo,base_url={server.url}/v1/completions,num_concurrent=2,max_retries=1"
    model += f",tokenizer={tmp_path}/hf,add_bos_token=True"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, "--log_samples"], capture_output=True, text=True, env=surroundings, timeout=500, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answers = {name: read_answers(tmp_path / "out", name) for name in TASKS}

    texts = [f"The capital of {row['country']} is" for row in ROWS]
    for text, found in zip(texts, answers["capitals"], strict=True):
        length = len(server.llama.tokenizer.encode(text, bos=True, eos=False))
        scores = server.llama.score([f"{text} {city}" for city in CITIES])
        expected = [sum(score.logprobs[length:]) for score in scores]
        assert [float(one[0][0]) for one in found] == pytest.approx(expected, abs=1e-4)
    expected_texts = [one["generation"] for one in server.llama.text_completion(texts, 0, max_gen_len=8, stop=["."])]
    assert [found[0][0] for found in answers["said"]] == expected_texts
    tokenizer = server.llama.tokenizer  # here the harness puts a begin-of-text of its own before ours
    rolled = [[tokenizer.bos_id, *tokenizer.encode(f"{text} a city.", bos=True, eos=False)] for text in texts]
    totals = [sum(one.prompt_logprobs[1:]) for one in server.llama.complete(rolled, 1, 0, prompt_logprobs=True)]
    assert [float(found[0][0]) for found in answers["rolled"]] == pytest.approx(totals, abs=1e-4)


def read_answers(folder: Path, task: str) -> list[Any]:
    """What the harness was answered for each row."""
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    return [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
