"""Metrics of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """The metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ldm_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.image_seconds = Histogram(
            "ldm_image_seconds",
            "Seconds from the first step of an image to its file.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.rows = Histogram(
            "ldm_evaluation_rows",
            "Rows of the batch of each evaluation of a denoiser; a guided image has two.",
            buckets=(1, 2, 4, 6, 8, 12, 16, 24, 32),
            registry=self.registry,
        )
        self.waiting = Gauge("ldm_waiting_images", "Images in the queue.", registry=self.registry)
        self.running = Gauge("ldm_running_images", "Images that are being computed.", registry=self.registry)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
