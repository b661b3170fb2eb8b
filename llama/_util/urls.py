"""URLs that are given for files: those of object stores are read, and others are refused with a next step.

Knows texts; opens nothing.
"""

import re

from ..errors import LlamaError, shorten

HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # owner/name, as the Hugging Face Hub has them
_HUB_URL = re.compile(rf"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)(?:models/)?({HUB_NAME})")
_STORE_URL = re.compile(r"(?:gs|az)://|https://[\w-]+\.blob\.core\.windows\.net/")
_OTHER_URL = re.compile(r"(?:https?|ftp|hf|s3|ssh|git|hdfs)://")


def is_url(path: object) -> bool:
    return "://" in str(path)


def check_url(url: str) -> None:
    """Raise LlamaError, with the next step, for a URL that isn't one of an object store."""
    if match := _HUB_URL.match(url):
        raise LlamaError(f"{shorten(url)} is on the Hugging Face Hub: {say_download(match[1])}")
    if url.startswith("file://"):
        raise LlamaError(f"{shorten(url)} is a URL of this machine: write {shorten(url.removeprefix('file://'))}")
    if _OTHER_URL.match(url) and not _STORE_URL.match(url):
        raise LlamaError(
            f"{shorten(url)} is no URL of a store that is read, which are gs://..., az://... and "
            "https://ACCOUNT.blob.core.windows.net/...: download the files, and give their path"
        )


def say_download(name: str) -> str:
    """How to get a model of the Hub. name: its owner and name there."""
    target = name.partition("/")[2]
    return f"nothing is downloaded from there; run `hf download {name} --local-dir {target}`, and give {target}"
