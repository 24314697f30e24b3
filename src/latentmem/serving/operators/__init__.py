"""Who may use a server, how much, and what its operator sees of it."""
