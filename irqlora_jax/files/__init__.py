"""Reads and writes files: Hugging Face folders and the hub, safetensors, small text files."""
