"""Teams: who speaks, who reads whom, and whose response is the team's action."""
