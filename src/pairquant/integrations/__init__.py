"""Registration with the libraries that run models."""
