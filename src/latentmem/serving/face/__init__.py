"""The OpenAI-compatible endpoints: from bodies to asks, from answers to what clients of these endpoints read."""
