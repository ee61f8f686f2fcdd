"""`python -m headtail.cli`."""

from headtail.cli import main

main()
