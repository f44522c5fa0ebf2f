"""Images and captions: reading and writing of shards, and batches in an order that can be resumed anywhere."""

from __future__ import annotations

from ldm.data.config import DataConfig, ShardsData
from ldm.data.samples import Batch, BatchIndices, Samples
from ldm.data.shapes import Shapes
from ldm.data.stream import EvaluationLoader, TrainStream
from ldm.data.toy import Digits, SCurve

__all__ = [
    "Batch",
    "BatchIndices",
    "DataConfig",
    "Digits",
    "EvaluationLoader",
    "SCurve",
    "Samples",
    "Shapes",
    "ShardsData",
    "TrainStream",
]
