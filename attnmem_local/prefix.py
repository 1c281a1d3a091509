"""A prefix from text or chat messages, and recognising it again in a live prompt.

The prefix owns BOS and the system turn. A chat prefix ends where the renderings of two chats with different next
user turns part, so it takes in the opening of that turn too.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import PrefixMismatch


@dataclass
class Prefix:
    tokens: list[int]
    text: str
    messages: list[dict] | None = None


def text_prefix(tokenizer, text: str) -> Prefix:
    return Prefix(tokenizer.encode(text, add_bos=True), text)


def chat_prefix(tokenizer, messages: list[dict]) -> Prefix:
    """Render messages with the model's own template."""
    a, b = (tokenizer.render([*messages, {"role": "user", "content": text}], True) for text in ("A", "9"))
    n = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    return Prefix(a[:n], tokenizer.decode(a[:n]), messages)


def read_prefix(tokenizer, path: str | Path, system: bool = False) -> Prefix:
    """A prefix from a file: `.json` holds chat messages, anything else is text (with `system`, of the system turn)."""
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        return chat_prefix(tokenizer, parse_messages(text))
    if system:
        return chat_prefix(tokenizer, [{"role": "system", "content": text}])
    return text_prefix(tokenizer, text)


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
