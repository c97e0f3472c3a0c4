"""Run the command line: `python -m pairquant` does the same as `pairquant`."""

from .cli import main

main()
