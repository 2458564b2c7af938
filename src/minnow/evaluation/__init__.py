"""Examination of models: tasks with error bars. Importing this package registers the tasks."""

from minnow.evaluation import (
    arithmetic,
    bits_per_byte,
    choices,
    identity,
    judge,
    long_context,
    pictures,
    pond,
    preference,
    tools,
    wins,
)
from minnow.evaluation.evaluate import TaskResult, evaluate
from minnow.evaluation.registry import GenerationTask, Score, Subject, Task, TaskOptions, make_tasks, register

__all__ = [
    "GenerationTask",
    "Score",
    "Subject",
    "Task",
    "TaskOptions",
    "TaskResult",
    "arithmetic",
    "bits_per_byte",
    "choices",
    "evaluate",
    "identity",
    "judge",
    "long_context",
    "make_tasks",
    "pictures",
    "pond",
    "preference",
    "register",
    "tools",
    "wins",
]
