"""Planning: what a run will take of memory, disk and network, told before anything is spent."""
