"""What other people's errors say, in a line."""

__all__ = ["reason"]


def reason(error: BaseException) -> str:
    """The first words of an error as one line, or its type's name where it says nothing.

    Some errors begin with a heading, and torch's go on to list every weight: a few words are taken,
    not a line.
    """
    return " ".join(str(error).split())[:200] or type(error).__name__
