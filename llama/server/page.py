"""GET /: the chat page, `page.html`, and the policy that a browser holds it to.

Knows the file and HTTP's headers; what the page does is written in it.
"""

import base64
import hashlib
import re
from pathlib import Path

from fastapi.responses import HTMLResponse

from .._util.files import read_text

PAGE = Path(__file__).with_name("page.html")


def respond_with_page() -> HTMLResponse:
    """The page. Only its own script and style are run, and it may ask only the server that it came from."""
    text = read_text(PAGE)
    headers = {
        "Content-Security-Policy": write_policy(text),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(text, headers=headers)


def write_policy(page: str) -> str:
    """The Content-Security-Policy of a page whose scripts and styles stand in it; they are named by their hashes."""
    rules = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "script-src": hash_element(page, "script"),
        "style-src": hash_element(page, "style"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def hash_element(page: str, tag: str) -> str:
    """The hash of the one element with this tag."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
