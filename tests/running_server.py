"""Servers of the demo model for tests, each in a thread of this process, at a free port."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.demo import demo_checkpoint
from llama.cli.serve import listen
from llama.server.service import ServerOptions, Service
from llama.server.threaded import serve_in_thread


@dataclass
class Running:
    url: str
    service: Service

    @property
    def llama(self) -> Llama:
        return self.service.llama

    def wait_until_idle(self) -> None:
        """Until no request is left in the engine."""
        deadline = time.monotonic() + 30
        while self.llama.engine.stepper.sequences or self.service.queue.open:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def start(stack: ExitStack, llama: Llama, **options: Any) -> Running:
    """A server until the stack is closed."""
    service = Service(llama, ServerOptions(**{"model": "demo", **options}))
    listener = stack.enter_context(listen("127.0.0.1", 0))
    stack.enter_context(serve_in_thread(service, listener))
    return Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service)


def build(**options: Any) -> Llama:
    sizes = {"max_seq_len": 512, "max_batch_size": 4, "device": "cpu", "dtype": "float32"}
    return Llama.build(demo_checkpoint(), **{**sizes, **options})


# As Llama 3.1 writes dialogs, in short; by the second line it is known how its calls are written.
TEMPLATE = """{{- bos_token }}
{%- if tools %}{{- 'Write {"name": function name, "parameters": dictionary}: ' ~ tools | tojson }}{% endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
{{- message.tool_calls | tojson if message.tool_calls else message.content }}{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""


def build_with_tools(directory: Path) -> Llama:
    """The demo model with a template that has tools."""
    convert(demo_checkpoint(), directory / "hf", "hf")
    (directory / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    return Llama.build(directory / "hf", max_seq_len=1024, max_batch_size=4, device="cpu", dtype="float32")
