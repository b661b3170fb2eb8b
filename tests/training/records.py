"""Records of each task that are right, for the tests of training data and of fine-tuning."""

from typing import Any

GOOD: dict[str, list[Any]] = {
    "language": [
        {"text": "a"},
        {"prompt": "a", "completion": " b", "id": 7},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
    "classify": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
    "tag": [
        {"text": "In Rome", "spans": [{"start": 3, "end": 7, "label": "x"}]},
        {"text": "In", "spans": [{"start": 0, "end": 1, "label": "y"}, {"start": 1, "end": 2, "label": "y"}]},
        {"text": "a", "spans": []},
    ],
    "answer": [
        {"question": "who?", "context": "Ann", "answers": [{"text": "Ann", "start": 0}, {"text": "nn", "start": 1}]},
        {"question": "who?", "context": "é", "answers": []},
    ],
}
