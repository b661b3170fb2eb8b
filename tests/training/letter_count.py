"""A task from outside of the package, for test_new_task.py: how often the letter "b" occurs in a text."""

import torch

from llama import TaskModel
from llama.checkpoints.task_spec import TaskSpec
from llama.tasks.heads import Head, Output
from llama.tasks.registry import Task
from llama.training.preprocessing import Example, Preprocessor, stack_labels
from llama.training.record_formats import Record, check_text, get_text
from llama.training.registry import TrainingTask


class LetterCounter(Head):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.count = self.create_linear(1, bias=True)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor | None = None) -> Output:
        counts = self.count(self.model.hidden_states(tokens, None, lengths)[range(len(tokens)), lengths - 1])  # (B, 1)
        return Output(counts, None if labels is None else (counts[:, 0].float() - labels).abs().mean())


def read(preprocessor: Preprocessor, record: Record) -> list[Example]:
    return [Example(preprocessor.tokenizer.encode(record["text"], bos=True, eos=False), float(record["count"]))]


def predict(model: TaskModel, texts: list[str]) -> list[float]:
    rows = [model.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    return [float(model.head(torch.tensor([row]), torch.tensor([len(row)])).logits) for row in rows]


def measure(predictions: list[float], expected: list[int]) -> dict[str, float]:
    return {"closeness": sum(1 / (1 + abs(a - b)) for a, b in zip(predictions, expected, strict=True)) / len(expected)}


SPEC = TaskSpec("count", "ForLetterCount", {"count.weight": (1, "dim"), "count.bias": (1,)}, outputs=("count",))
COUNT = Task(SPEC, LetterCounter, "SEQ_CLS", predict, measure, "closeness")
TASK = TrainingTask(COUNT, lambda r: check_text(r, "text"), read, stack_labels, get_text, lambda r: r["count"])
