"""Worlds that tasks are played in: instructions, actions, rewards. None of them knows of memory."""
