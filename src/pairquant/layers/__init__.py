"""The modules that run quantized weights inside a model."""
