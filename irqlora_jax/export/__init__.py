"""Exports runs as folders that transformers and PEFT load."""
