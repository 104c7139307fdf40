"""Run the command line with `python -m leadline.cli`."""

from . import main

main()
