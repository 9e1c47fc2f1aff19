"""LLaMA and its relatives: architecture, layers, loss, and the names and shapes of its weights."""
