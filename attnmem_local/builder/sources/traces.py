"""Traces: text from the user that really followed the prefix."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...memory.errors import BadInput, PrefixMismatch
from ...memory.prefix import Prefix
from ...prompt.live import live_chat, live_prompt
from ...prompt.texts import read_text
from . import WINDOW

if TYPE_CHECKING:
    from ...engine.tokenizer import Tokenizer
    from ..job import Build


class Traces:
    is_real = True
    written = (0, 0)

    def __init__(self, query: str | PathLike | list, build: "Build"):
        """query: a file, or a list of traces."""
        self.name = f"{len(query)} traces" if isinstance(query, list) else str(query)
        texts = query if isinstance(query, list) else read_traces(query)
        self._windows = traces(build.model.tokenizer, build.prefix, texts, WINDOW)
        self.n_tokens = sum(map(len, self._windows))

    def windows(self, build: "Build") -> list[list[int]]:
        return self._windows


def read_traces(path: str | PathLike) -> list[str | list[dict]]:
    """The traces in a file, each a text or chat messages.

    A `.jsonl` has one JSON object per line with "text" or "messages"; any other file is one text. Raises BadInput or OSError.
    """
    text = read_text(path)
    if Path(path).suffix.lower() != ".jsonl":
        texts: list[str | list[dict]] = [text]
    else:
        texts = [_trace(line, f"'{path}', line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not any(texts):
        raise BadInput(f"'{path}' has no text; give a file with text that followed the prefix")
    return texts


def _trace(line: str, where: str) -> str | list[dict]:
    try:
        row = json.loads(line)
        trace = row["messages"] if "messages" in row else row["text"]
        json.dumps(trace, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UnicodeEncodeError:
        raise BadInput(f"{where}: half of a surrogate pair, which is no character") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{where}: expected a JSON object with 'text' or 'messages'") from None
    is_chat = isinstance(trace, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in trace)
    if not (is_chat if "messages" in row else isinstance(trace, str)):
        raise BadInput(f"{where}: 'text' is a string, 'messages' a list of objects, each with a role and a content")
    return trace


def traces(tokenizer: "Tokenizer", prefix: Prefix, texts: Sequence[str | list[dict] | list[int]], window: int) -> list[list[int]]:
    """Windows of at most `window` tokens from texts, lists of tokens, and chats, without the prefix that they begin with.

    Raises BadInput, which gives the number of the trace, for anything else and for a trace that does not fit the prefix.
    """
    windows = []
    for number, trace in enumerate(texts, 1):
        try:
            tokens = _tokens(tokenizer, prefix, trace)
        except BadInput as error:
            kind = PrefixMismatch if isinstance(error, PrefixMismatch) else BadInput
            raise kind(f"trace {number}: {error}") from None
        windows += [tokens[i : i + window] for i in range(0, len(tokens), window)]
    return [w for w in windows if w]


def _tokens(tokenizer: "Tokenizer", prefix: Prefix, trace: Any) -> list[int]:
    """The tokens of one trace after the prefix. Anything but text and tokens is taken for a chat, which is checked there."""
    if isinstance(trace, str):
        return live_prompt(tokenizer, prefix, trace) if trace else []
    if isinstance(trace, list) and trace and all(isinstance(token, int) for token in trace):
        return trace
    return live_chat(tokenizer, prefix, trace, add_generation_prompt=False)
