"""What a server counts, as Prometheus reads it. Knows numbers; knows no model."""

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        in_it: dict[str, Any] = {"registry": self._registry}
        timed = {**in_it, "buckets": SECONDS}
        self.requests = Counter("llama_requests", "Requests by endpoint and status.", ["path", "status"], **in_it)
        self.open = Gauge("llama_open_answers", "Answers that wait or are under way.", **in_it)
        self.prompt_tokens = Counter("llama_prompt_tokens", "Tokens of prompts.", **in_it)
        self.cached_tokens = Counter("llama_cached_tokens", "Those that the KV cache held.", **in_it)
        self.tokens = Counter("llama_generated_tokens", "Tokens of answers.", **in_it)
        self.first_token = Histogram("llama_first_token_seconds", "Seconds to a request's first token.", **timed)
        self.between = Histogram("llama_between_tokens_seconds", "Seconds between a request's steps.", **timed)

    def note_tokens(self, count: int, first: float | None, gap: float) -> None:
        """New tokens of a request. first: seconds since it came, if they are its first; gap: since the ones before."""
        self.tokens.inc(count)
        if first is not None:
            self.first_token.observe(first)
        else:
            self.between.observe(gap)

    def note_prompts(self, count: int, cached: int) -> None:
        self.prompt_tokens.inc(count)
        self.cached_tokens.inc(cached)

    def write(self) -> bytes:
        return generate_latest(self._registry)


class Labelled(Collector):
    """Figures of several copies of a model, each with its number as a label."""

    def __init__(self, texts: Sequence[str]):
        """texts: as `Metrics.write` writes them. Requests are those of the first copy, which hears all clients."""
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for copy, text in enumerate(self._texts):
            for family in text_string_to_metric_families(text):
                is_shared = family.name.startswith("llama_requests")
                if is_shared and copy:
                    continue
                own = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                label = {} if is_shared else {"copy": str(copy)}
                own.samples += [sample._replace(labels={**sample.labels, **label}) for sample in family.samples]
        yield from families.values()


def label_copies(texts: Sequence[str]) -> bytes:
    """One text of the figures of several copies."""
    registry = CollectorRegistry()
    registry.register(Labelled(texts))
    return generate_latest(registry)
