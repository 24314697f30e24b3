"""The one place in which a team plays: team x memory x environment -> trajectories."""

from latentmem.rollout.prompts import digest_of, message_of, prompt_of, read_by
from latentmem.rollout.rollouts import EPISODES_AT_ONCE, Rollouts, Seconds, player_of, queries_of, rollout

__all__ = [
    "EPISODES_AT_ONCE",
    "Rollouts",
    "Seconds",
    "digest_of",
    "message_of",
    "player_of",
    "prompt_of",
    "queries_of",
    "read_by",
    "rollout",
]
