"""`python -m headtail.cli`."""

from headtail.cli.entry import main

main()
