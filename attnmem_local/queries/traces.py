"""Traces: text that really followed the prefix, from the user."""

import json
from pathlib import Path

from ..prefix import Prefix, drop_prefix, with_prefix_messages
from ..texts import read_text


def read_traces(path: str | Path) -> list[str | list[dict]]:
    """Traces from a file, each a text or chat messages.

    `.jsonl`: one JSON object per line with "text" or "messages"; anything else is one text. Raises ValueError.
    """
    text = read_text(path)
    if Path(path).suffix.lower() != ".jsonl":
        found = [text]
    else:
        found = [_trace(line, f"'{path}', line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not any(found):
        raise ValueError(f"'{path}' has no text")
    return found


def _trace(line: str, where: str) -> str | list[dict]:
    try:
        row = json.loads(line)
        trace = row["messages"] if "messages" in row else row["text"]
        json.dumps(trace, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half of a surrogate pair, which is no character") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{where}: expected a JSON object with 'text' or 'messages'") from None
    is_chat = isinstance(trace, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in trace)
    if not (is_chat if "messages" in row else isinstance(trace, str)):
        raise ValueError(f"{where}: 'text' is a string, 'messages' a list of objects, each with a role and a content")
    return trace


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
