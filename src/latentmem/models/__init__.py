"""Language models and embedders: where their files come from, how they sample, how they are scored."""
