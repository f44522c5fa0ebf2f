"""Diagnosis of a run: checks in causal order that find why its images are poor; see docs/diagnose.md.

A check is one file in ``ldm/diagnosis/checks``, a generator that reads an :class:`ldm.diagnosis.opened_run.OpenedRun`.
"""

from __future__ import annotations
