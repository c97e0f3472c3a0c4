"""`python -m pairquant.engines.transformers_server serve MODEL`: `transformers serve`, which then knows our checkpoints.

Importing this package has registered them; Transformers' own command would load random weights with a warning.
"""

from __future__ import annotations

from transformers.cli.transformers import app

if __name__ == "__main__":
    app()
