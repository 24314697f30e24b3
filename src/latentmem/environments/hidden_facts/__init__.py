"""A world of invented places whose facts are told only in past episodes."""
