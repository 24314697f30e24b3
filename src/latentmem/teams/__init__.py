"""Who speaks, who reads whom, and whose word is the team's action."""
