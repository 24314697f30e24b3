"""Servers that sample for the agents, in place of the model in this process."""
