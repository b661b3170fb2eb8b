"""Asks the demo model questions whose exact wording isn't in its training text, and counts the right answers.

    python -m demo.evaluate [--ckpt_dir demo/model] [--show 3]

Knows `Llama.chat_completion`, as any caller does; knows nothing of training.
"""

from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from demo.corpus import generate_questions
from llama import Llama
from llama.cli.program import run

BATCH = 16


def evaluate(
    ckpt_dir: str = str(Path(__file__).parent / "model"), device: str | None = None, show: int = 0
) -> dict[str, float]:
    """The share of right answers at temperature 0, by kind and of all. Prints it, and `show` wrong answers a kind."""
    llama = Llama.build(ckpt_dir, max_seq_len=512, max_batch_size=BATCH, device=device)
    questions = sorted(generate_questions(), key=lambda q: sum(len(m["content"]) for m in q.messages))
    right: dict[str, list[bool]] = defaultdict(list)
    wrong: dict[str, list[str]] = defaultdict(list)
    for start in tqdm(range(0, len(questions), BATCH), desc="asking", unit="batch", leave=False, disable=None):
        batch = questions[start : start + BATCH]
        for question, answer in zip(
            batch, llama.chat_completion([list(q.messages) for q in batch], temperature=0), strict=True
        ):
            content = answer["generation"]["content"]
            right[question.kind].append(question.is_right(content))
            if not right[question.kind][-1]:
                wrong[question.kind].append(f"{question.messages[-1]['content']!r} -> {content!r}")
    answers = [r for kind in right.values() for r in kind]
    scores = {kind: sum(r) / len(r) for kind, r in sorted(right.items())} | {"all": sum(answers) / len(answers)}
    print("held-out questions answered right:")
    for kind, score in scores.items():
        print(f"  {kind:<12} {score:6.1%} of {len(right.get(kind, answers))}")
        for line in wrong[kind][:show]:
            print(f"      {line}")
    return scores


def main(ckpt_dir: str = str(Path(__file__).parent / "model"), device: str | None = None, show: int = 0) -> None:
    evaluate(ckpt_dir, device, show)


if __name__ == "__main__":
    run(main)
