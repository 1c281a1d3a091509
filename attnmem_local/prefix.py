"""A prefix from text or chat messages, and recognising it again in a live prompt.

A prefix may be made of several parts, files say; each is a segment of its memory, which can be rebuilt alone. The
prefix owns BOS and the system turn. A chat prefix ends where the renderings of two chats with different next
user turns part, so it takes in the opening of that turn too.
"""

import bisect
import json
from dataclasses import dataclass, field
from pathlib import Path

from .errors import PrefixMismatch
from .texts import read_text


@dataclass
class Prefix:
    tokens: list[int]
    text: str
    messages: list[dict] | None = None
    offset: list[int] = field(default_factory=list)  # segment s holds tokens[offset[s]:offset[s + 1]]

    def __post_init__(self):
        self.offset = self.offset or [0, len(self.tokens)]


def chat_prefix(tokenizer, messages: list[dict], parts: list[str] = ()) -> Prefix:
    """Render messages with the model's own template. parts: texts that together are the first message."""
    a, b = (tokenizer.render([*messages, {"role": "user", "content": text}], True) for text in ("A", "9"))
    n = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    tokens, text = a[:n], tokenizer.decode(a[:n])
    return Prefix(tokens, text, messages, _offset(tokenizer, tokens, text, parts))


def read_prefix(tokenizer, paths: list[str | Path], system: bool = False) -> Prefix:
    """A prefix from files: one `.json` with chat messages, or parts of a text (with `system`, of the system message)."""
    parts = [read_text(path) for path in paths]
    if Path(paths[0]).suffix.lower() == ".json":
        if len(paths) > 1:
            raise ValueError("chat messages cannot be one of several parts; give one .json, or text files")
        return chat_prefix(tokenizer, parse_messages(parts[0]))
    if system:
        return chat_prefix(tokenizer, [{"role": "system", "content": "".join(parts)}], parts)
    tokens, text = tokenizer.encode("".join(parts), add_bos=True), "".join(parts)
    return Prefix(tokens, text, offset=_offset(tokenizer, tokens, text, parts))


def _offset(tokenizer, tokens: list[int], text: str, parts: list[str]) -> list[int]:
    """Where the parts of a text begin and end in its tokens; a token across a border belongs to the part before."""
    offset = [0]
    at = max(text.find(parts[0]), 0) if parts else 0
    for part in parts[:-1]:
        at += len(part)
        offset.append(bisect.bisect_left(range(len(tokens)), at, lo=offset[-1], key=lambda n: len(tokenizer.decode(tokens[:n]))))
    if len({*offset, len(tokens)}) != len(offset) + 1:
        raise ValueError("a part of the prefix is empty")
    return [*offset, len(tokens)]


def parse_messages(text: str) -> list[dict]:
    """Chat messages from JSON. Raises ValueError."""
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"chat messages are not JSON: {error}") from None
    if not (isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)):
        raise ValueError("chat messages are a JSON list of objects, each with a role and a content")
    return messages


def drop_prefix(tokens: list[int], prefix_tokens: list[int]) -> list[int]:
    """The live part of a rendered chat. Raises PrefixMismatch if it does not begin with the prefix."""
    n = len(prefix_tokens)
    if tokens[:n] != prefix_tokens:
        same = next((i for i, (a, b) in enumerate(zip(tokens, prefix_tokens)) if a != b), min(len(tokens), n))
        raise PrefixMismatch(
            f"the chat does not begin with the memory's prefix: {same} of {n} tokens agree; "
            "use the system prompt and chat template that the memory was built with, or detach it"
        )
    return tokens[n:]


def with_prefix_messages(messages: list[dict], prefix_messages: list[dict]) -> list[dict]:
    """A chat that begins with the messages of the prefix; they need not be repeated in the live chat."""
    if messages[: len(prefix_messages)] == prefix_messages:
        return messages
    if any(m["role"] == "system" for m in messages) and any(m["role"] == "system" for m in prefix_messages):
        raise PrefixMismatch("the chat has a system message, but the memory holds another one; leave it out or detach the memory")
    return [*prefix_messages, *messages]
