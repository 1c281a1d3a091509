"""Refusals, with an exception for each reason. Any other exception is a bug and is never reported as bad input.

Every message says what is wrong, what was expected, and what to do. Messages of the native loader have the form
"<reason>: <explanation>"; the reason selects the exception.
"""

import os


class AttnmemError(Exception):
    """The base of all refusals."""


class BadInput(AttnmemError, ValueError):
    """A text, file, option or model cannot be used."""


class OutOfRange(AttnmemError, OverflowError):
    """A number does not fit into its type in the memory file."""


class MemoryRefused(BadInput):
    """A memory cannot be used."""

    reason = "invalid"


class Unreadable(MemoryRefused):
    """The file cannot be opened or read."""

    reason = "unreadable"


class NotAMemory(MemoryRefused):
    """The file is not an attention-state memory."""

    reason = "not_a_memory"


class Truncated(MemoryRefused):
    """The file ends before its content is complete."""

    reason = "truncated"


class WrongVersion(MemoryRefused):
    """The file has a format version that this build does not read."""

    reason = "version"


class Invalid(MemoryRefused):
    """A field, offset, type, index or number in the file is out of bounds."""

    reason = "invalid"


class WrongModel(MemoryRefused):
    """The memory was built for another model."""

    reason = "wrong_model"


class WrongFinetune(MemoryRefused):
    """The memory was built for another fine-tune of the model."""

    reason = "wrong_finetune"


class Unsupported(MemoryRefused):
    """The model's architecture, or an option of the context, does not work with memories."""

    reason = "unsupported"


class PrefixMismatch(MemoryRefused):
    """A prompt does not begin with the prefix that the memory stands for."""

    reason = "prefix_mismatch"


class StaleStream(MemoryRefused):
    """A stream cannot continue: the memories or live tokens it began with have changed."""

    reason = "stale_stream"


def naming(error: MemoryRefused, path: str | os.PathLike) -> MemoryRefused:
    """The same refusal with a message that names the file."""
    return error if str(path) in str(error) else type(error)(f"'{path}': {error}")


_BY_REASON = {cls.reason: cls for cls in MemoryRefused.__subclasses__()}


def refusal(message: str) -> MemoryRefused:
    """The exception for a message of the form "<reason>: <explanation>"."""
    reason, _, explanation = message.partition(": ")
    cls = _BY_REASON.get(reason)
    return cls(explanation) if cls else MemoryRefused(message)
