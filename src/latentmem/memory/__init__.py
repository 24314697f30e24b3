"""What a team is told before an episode: nothing, text, or latents composed for each role."""
