"""Sessions: the episodes of served programs, kept on disk until they are trajectories in the bank."""
