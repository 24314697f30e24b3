"""Agent programs of any framework, served with a memory: an OpenAI-compatible server and what stands behind it."""
