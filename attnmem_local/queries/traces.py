"""Traces: text that really followed the prefix, from the user."""

import json
from pathlib import Path

from ..prefix import Prefix, drop_prefix, with_prefix_messages


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
    """Windows of at most `window` tokens from texts, tokens, or chats, which are rendered and lose the prefix they begin with."""
    windows = []
    for trace in found:
        if isinstance(trace, str):
            tokens = tokenizer.encode(trace, add_bos=False)
        elif trace and isinstance(trace[0], int):
            tokens = trace
        else:
            chat = with_prefix_messages(trace, prefix.messages or [])
            tokens = drop_prefix(tokenizer.render(chat, False), prefix.tokens)
        windows += [tokens[i : i + window] for i in range(0, len(tokens), window)]
    return [w for w in windows if w]
