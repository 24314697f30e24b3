"""Training of the composer: a supervised warm start (sft), then LMPO on the team's own reward."""
