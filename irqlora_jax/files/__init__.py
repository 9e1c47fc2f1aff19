"""Files of others: Hugging Face folders, the hub, safetensors, small text files."""
