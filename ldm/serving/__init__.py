"""The HTTP server: generates images for browsers and other programs, several requests in one batch."""

from __future__ import annotations
