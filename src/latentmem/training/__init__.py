"""Training of the composer: supervised warm start (sft), then LMPO on the team's own reward."""
