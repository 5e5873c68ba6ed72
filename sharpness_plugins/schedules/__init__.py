"""Batch size as a pure function of training: progress and memory in, a decision with its reason out."""

from __future__ import annotations

from .combinators import Cap, Hold, Max, Min, Monotone, Then
from .core import JSON, BatchSchedule, Decision, Memory, Progress, Signal, sizes, smallest
from .durations import Duration
from .learning_rate import FromLearningRate
from .noise import InnerProductTest, NoiseScale, NormTest
from .parse import SCHEDULES, parse_schedule
from .planner import Plan, check_world_size, plan
from .sharpness import SharpnessSwitch
from .timed import Double, Fixed, Steps, WarmStart

__all__ = [
    "JSON",
    "SCHEDULES",
    "BatchSchedule",
    "Cap",
    "Decision",
    "Double",
    "Duration",
    "Fixed",
    "FromLearningRate",
    "Hold",
    "InnerProductTest",
    "Max",
    "Memory",
    "Min",
    "Monotone",
    "NoiseScale",
    "NormTest",
    "Plan",
    "Progress",
    "SharpnessSwitch",
    "Signal",
    "Steps",
    "Then",
    "WarmStart",
    "check_world_size",
    "parse_schedule",
    "plan",
    "sizes",
    "smallest",
]
