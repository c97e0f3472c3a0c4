"""`python -m pairquant`."""

from .cli import main

main()
