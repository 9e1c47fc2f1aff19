"""Serves a model with the OpenAI API: requests, one batch for all of them, answers."""
