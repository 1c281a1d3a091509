"""Text from files on a terminal: nothing in it controls the terminal or is read as markup."""

import re

# C0 but tab and line feed, DEL and C1; marks that turn the direction of text; what ends a line in some programs; surrogates
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text with control characters written as escapes, such as \\x1b; line feeds and tabs stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Printable text without line feeds, for the cell of a table."""
    return printable(" ".join(text.split()))
