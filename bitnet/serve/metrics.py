"""The figures of /metrics, in Prometheus' text format. Their names are an interface: dashboards depend on them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # bounds of the buckets
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server, usable from any thread."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, help: str) -> Counter:  # noqa: A002 - the library's name for it
            return Counter(f"bitnet_{name}", help, registry=registry)

        def gauge(name: str, help: str) -> Gauge:  # noqa: A002
            return Gauge(f"bitnet_{name}", help, registry=registry)

        def seconds(name: str, help: str) -> Histogram:  # noqa: A002
            return Histogram(f"bitnet_{name}_seconds", help, buckets=_SECONDS, registry=registry)

        self.requests = Counter(
            "bitnet_requests", "HTTP requests by route and status.", ["route", "status"], registry=registry
        )
        self.ready = gauge("ready", "1 once the model is loaded.")
        self.sequences = gauge("slots", "Sequences that can be decoded at once.")
        self.running = gauge("slots_busy", "Sequences that are running.")
        self.waiting = gauge("queue_length", "Jobs waiting for a free sequence.")
        self.passes = counter("passes", "Forward passes of the engine.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read.")
        self.cached_tokens = counter("prompt_tokens_reused", "Prompt tokens that the KV cache held already.")
        self.generated_tokens = counter("generated_tokens", "Tokens generated.")
        self.cancelled = counter("cancelled", "Jobs whose client disconnected before they finished.")
        self.first_token_seconds = seconds("first_token", "From the arrival of a job to its first token.")
        self.job_seconds = seconds("text", "From the arrival of a job to its end.")

    def render(self) -> bytes:
        """All figures as text."""
        return bytes(generate_latest(self._registry))
