"""What resumable outputs have in common: each belongs to one job, and a refusal names --force.

A job is described by a dict of plain values, such as its settings and digests of its inputs. The output records them
when it is begun. The same job resumes it later, and any other job is refused. Knows files; knows no prompts and no
models.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import LlamaError, shorten, to_one_line

BEGIN_ANEW = "name another output (--output), or begin anew with --force (force=True)"


def check_same_job(path: Path, recorded: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Raise LlamaError, naming the first difference, unless `path` was begun by this job.

    recorded: the description in the file. job: the description of this run.
    """
    for name, value in job.items():
        if recorded.get(name) != value:
            before, now = ("not set" if v is None else shorten(v) for v in (recorded.get(name), value))
            raise LlamaError(
                f"{path} was begun with another {name} ({before}, now {now}): "
                f"use the same {name} as before, {BEGIN_ANEW}"
            )


@contextlib.contextmanager
def refuse_damaged(path: Path, what: str) -> Iterator[None]:
    """Raise LlamaError for errors in this context, which come from content of `path` that isn't `what`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise LlamaError(f"{path} is damaged, or isn't {what} ({to_one_line(e)}): {BEGIN_ANEW}") from None
