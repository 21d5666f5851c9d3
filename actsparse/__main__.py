"""`python -m actsparse` is the `actsparse` command."""

from actsparse.cli import main

main()
