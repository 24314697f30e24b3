"""Programming tasks: a domain that judges code by its tests, and the program that runs them in the sandbox."""
