"""Many runs from one file, and the one table that they make: what is compared, played, reckoned and shown."""
