"""Worlds in which tasks are played: instructions, actions, rewards. None of them knows about memory."""
