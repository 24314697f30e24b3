"""Memories compared on the same tasks, and what each of them is worth, costs and carries."""

from latentmem.evaluation.compare import check_online, evaluate, forget, task_bar
from latentmem.evaluation.results import Results

__all__ = ["Results", "check_online", "evaluate", "forget", "task_bar"]
