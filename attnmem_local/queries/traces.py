"""Traces: text that really followed the prefix, from the user."""

import json
from pathlib import Path

from ..errors import PrefixMismatch
from ..live import live_chat, live_prompt
from ..prefix import Prefix


def read_traces(path: str | Path) -> list[str | list[dict]]:
    """Traces from a file, each a text or chat messages.

    `.jsonl`: one JSON object per line with "text" or "messages"; anything else is one text. Raises ValueError.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix != ".jsonl":
        return [text]
    found = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            row = json.loads(line)
            found.append(row["messages"] if "messages" in row else row["text"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected a JSON object with 'text' or 'messages'") from None
    return found


def traces(tokenizer, prefix: Prefix, found: list[str | list[dict] | list[int]], window: int) -> list[list[int]]:
    """Windows of at most `window` tokens from texts, tokens, or chats, which are rendered; each loses the prefix it begins with.

    Raises ValueError, which names the trace by its number, for what is none of these or does not fit the prefix.
    """
    windows = []
    for number, trace in enumerate(found, 1):
        try:
            if isinstance(trace, str):
                tokens = live_prompt(tokenizer, prefix, trace)
            elif isinstance(trace, list) and trace and all(isinstance(token, int) for token in trace):
                tokens = trace
            else:
                tokens = live_chat(tokenizer, prefix, trace, add_generation_prompt=False)
        except ValueError as error:
            kind = PrefixMismatch if isinstance(error, PrefixMismatch) else ValueError
            raise kind(f"trace {number}: {error}") from None
        windows += [tokens[i : i + window] for i in range(0, len(tokens), window)]
    return [w for w in windows if w]
