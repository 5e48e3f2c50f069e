"""What /metrics tells, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server. All may be used from any thread."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, help: str) -> Counter:  # noqa: A002 - as the library calls it
            return Counter(f"bitnet_{name}", help, registry=registry)

        def gauge(name: str, help: str) -> Gauge:  # noqa: A002
            return Gauge(f"bitnet_{name}", help, registry=registry)

        def seconds(name: str, help: str) -> Histogram:  # noqa: A002
            return Histogram(f"bitnet_{name}_seconds", help, buckets=_SECONDS, registry=registry)

        self.requests = Counter(
            "bitnet_requests", "HTTP requests by route and status.", ["route", "status"], registry=registry
        )
        self.ready = gauge("ready", "1 once the model is loaded.")
        self.slots = gauge("slots", "Texts that can be written at once.")
        self.busy = gauge("slots_busy", "Texts being written.")
        self.waiting = gauge("queue_length", "Texts waiting for a slot.")
        self.passes = counter("passes", "Forward passes of the engine.")
        self.prompt = counter("prompt_tokens", "Prompt tokens read.")
        self.reused = counter("prompt_tokens_reused", "Prompt tokens that a slot held already.")
        self.written = counter("generated_tokens", "Tokens written.")
        self.cancelled = counter("cancelled", "Texts whose client left before their end.")
        self.first_token = seconds("first_token", "From the arrival of a text to its first token.")
        self.job_seconds = seconds("text", "From the arrival of a text to its end.")

    def render(self) -> bytes:
        """All of them as text."""
        return bytes(generate_latest(self._registry))
