"""Traces: text that really followed the prefix, from the user."""

import json
from pathlib import Path

from ...memory.errors import BadInput, PrefixMismatch
from ...memory.prefix import Prefix
from ...prompt.live import live_chat, live_prompt
from ...prompt.texts import read_text


def read_traces(path: str | Path) -> list[str | list[dict]]:
    """Traces from a file, each a text or chat messages.

    `.jsonl`: one JSON object per line with "text" or "messages"; anything else is one text. Raises BadInput.
    """
    text = read_text(path)
    if Path(path).suffix.lower() != ".jsonl":
        found = [text]
    else:
        found = [_trace(line, f"'{path}', line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not any(found):
        raise BadInput(f"'{path}' has no text")
    return found


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


def traces(tokenizer, prefix: Prefix, found: list[str | list[dict] | list[int]], window: int) -> list[list[int]]:
    """Windows of at most `window` tokens from texts, tokens, or chats, which are rendered; each loses the prefix it begins with.

    Raises BadInput, which names the trace by its number, for what is none of these or does not fit the prefix.
    """
    windows = []
    for number, trace in enumerate(found, 1):
        try:
            if isinstance(trace, str):
                tokens = live_prompt(tokenizer, prefix, trace) if trace else []
            elif isinstance(trace, list) and trace and all(isinstance(token, int) for token in trace):
                tokens = trace
            else:
                tokens = live_chat(tokenizer, prefix, trace, add_generation_prompt=False)
        except BadInput as error:
            kind = PrefixMismatch if isinstance(error, PrefixMismatch) else BadInput
            raise kind(f"trace {number}: {error}") from None
        windows += [tokens[i : i + window] for i in range(0, len(tokens), window)]
    return [w for w in windows if w]
