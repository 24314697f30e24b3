"""What processes have used, as the system counts it; the benchmarks of servers ask this."""

import os
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of all below it, in seconds; of this process, its own alone."""
    seconds = sum(map(float, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    tasks = Path(f"/proc/{pid}/task").iterdir() if pid != os.getpid() else ()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return seconds / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children))
