"""`python -m rolldiff` is `rolldiff`."""

from rolldiff.cli import main

if __name__ == "__main__":  # not in the processes of a training on several devices
    main()
