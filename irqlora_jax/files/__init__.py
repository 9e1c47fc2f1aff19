"""Reads and writes files: Hugging Face folders and the hub, safetensors, GGUF, small text files."""
