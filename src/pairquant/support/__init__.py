"""Helpers that every other folder may import: errors, devices, text, formatting."""
