"""Programs as teams: each episode is a run of a user's program, whose agents speak through a server of this process."""
