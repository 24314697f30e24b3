"""A world of invented places whose facts only past episodes tell: its words, its texts and who is asked for what."""
