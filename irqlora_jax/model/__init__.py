"""The LLaMA: architecture, layers, loss, and the names and shapes of its weights."""
