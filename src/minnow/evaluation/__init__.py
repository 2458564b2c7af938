"""Examination of models: tasks with error bars. Importing this package registers the tasks."""

from minnow.evaluation import bits_per_byte, pond
from minnow.evaluation.evaluate import TaskResult, evaluate
from minnow.evaluation.registry import GenerationTask, Score, Subject, Task, TaskOptions, make_task, register

__all__ = [
    "GenerationTask",
    "Score",
    "Subject",
    "Task",
    "TaskOptions",
    "TaskResult",
    "bits_per_byte",
    "evaluate",
    "make_task",
    "pond",
    "register",
]
