"""`python -m rolldiff` is `rolldiff`."""

from rolldiff.cli import main

main()
