"""Trackers: where metrics and pictures go. JSONL always; TensorBoard, W&B, trackio on request.

A row is one optimiser step: `step`, `iteration`, `seconds` and namespaced numbers such as
``reward/mean``. Each tracker is a file of its own and imports its package when it is opened.
"""

from __future__ import annotations

from diffusion_align.reporting.trackers.base import Picture, Row, Sitting, Tracker
from diffusion_align.reporting.trackers.jsonl import JsonlTracker
from diffusion_align.reporting.trackers.opening import Trackers, open_trackers

__all__ = ["JsonlTracker", "Picture", "Row", "Sitting", "Tracker", "Trackers", "open_trackers"]
