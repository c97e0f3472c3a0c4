"""Publishing a checkpoint on the Hugging Face hub."""
