"""Compare memories on the same tasks: what each of them brings, costs and carries."""

from latentmem.evaluation.compare import check_online, evaluate, forget, num_played, task_bar
from latentmem.evaluation.results import Results

__all__ = ["Results", "check_online", "evaluate", "forget", "num_played", "task_bar"]
