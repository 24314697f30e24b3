"""Memories: what each role is given before an episode, which may be nothing, text, or latents composed for it."""
