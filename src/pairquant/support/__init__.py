"""Small things that everything above may use: errors, devices, text, formatting."""
