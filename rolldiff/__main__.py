"""The command `rolldiff`, which is also `python -m rolldiff`.

Without its extra, `pip install rolldiff` is the library alone; the command then says what it needs.
"""

import sys


def main() -> None:
    """Run the command with the arguments of the process."""
    try:
        from rolldiff.cli import main as run
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "rolldiff":
            raise
        line = f"the command needs pip install 'rolldiff[train]', for {error.name} is missing"
        print(f"rolldiff: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":  # not in the processes of a training on several devices
    main()
