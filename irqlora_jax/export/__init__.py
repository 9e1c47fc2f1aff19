"""Runs as folders that transformers and PEFT load."""
