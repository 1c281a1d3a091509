"""Reading text files: UTF-8 with or without a byte order mark, with Unix or Windows line endings."""

import codecs
import os
from pathlib import Path

from ..memory.errors import BadInput

_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16-LE
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_SAMPLE = 4096  # number of bytes from which an encoding is guessed


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, without its byte order mark and with line feeds as line endings.

    Raises BadInput, which names the file, if it has another encoding; OSError if it cannot be read.
    """
    return decode(Path(path).read_bytes(), f"'{path}'")


def decode(data: bytes, name: str) -> str:
    """The text of UTF-8 bytes, normalised as by read_text. Raises BadInput; name: what an error calls the bytes."""
    encoding = _wide(data)
    if encoding is None:
        try:
            return data.removeprefix(codecs.BOM_UTF8).decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and not data[: error.start].isascii():
                raise BadInput(f"{name} ends in the middle of a character, so it is not complete; copy it again") from None
            if 0 in data[:_SAMPLE]:
                raise BadInput(f"{name} is not a text file; give one in UTF-8") from None
            encoding = "WINDOWS-1252"  # a superset of the printable part of Latin-1
            line = data.count(b"\n", 0, error.start) + 1
            name += f", line {line}, byte 0x{data[error.start]:02x},"
    raise BadInput(f"{name} is not UTF-8; it seems to be {encoding}. Convert it: iconv -f {encoding} -t UTF-8 OLD > NEW")


def _wide(data: bytes) -> str | None:
    """Detects UTF-16 or UTF-32 by its byte order mark, or UTF-16 of mostly Latin text by every other byte being 0."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return encoding
    sample = data[:_SAMPLE]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) > 0.4 * len(sample) and min(even, odd) < 0.1 * len(sample):
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return None
