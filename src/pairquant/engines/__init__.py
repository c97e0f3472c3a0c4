"""What runs a model: Transformers or vLLM, behind one protocol."""
