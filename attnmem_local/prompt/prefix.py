"""Making a prefix from text or chat messages.

A prefix may consist of several parts, such as files. Each part is a segment of the memory and can be rebuilt by itself. BOS and the
system turn belong to the prefix.
"""

import bisect
import logging
from collections.abc import Sequence
from datetime import datetime
from os.path import commonprefix
from pathlib import Path

from ..memory.errors import BadInput, Unsupported
from ..memory.messages import check_json, checked_tools, marked, normalised, parse_messages
from ..memory.prefix import Prefix
from .texts import read_text

_log = logging.getLogger(__name__)

# Beginnings of a user's message that could merge with the end of the prefix. No message merges with a special token.
_PROBES = (
    *("A", "9", "\n", "\n\nx", " x", "    x", "\t", "\r\n", ".", "'s", '"', ")", "/", "-", "é", "。", "🙂"),
    *("<|im_end|>", "[/INST]", ""),
)
_SEARCHED = 256  # number of characters before the user's message in which the end of the prefix is searched
_WAY_OUT = 'give the text as a .json of chat messages: [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "OK"}]'


def read_prefix(
    tokenizer, paths: list[str | Path], system: bool = False, tools: list[dict] | None = None, date: str | None = None
) -> Prefix:
    """A prefix from files: one `.json` of chat messages, or the parts of a text.

    system: the text is a system message. tools, date: see chat_prefix.
    Raises BadInput for files that make no prefix, OSError for one that cannot be read.
    """
    parts = [read_text(path) for path in paths]
    if Path(paths[0]).suffix.lower() == ".json":
        if len(paths) > 1:
            raise BadInput("chat messages cannot be one of several parts; give a single .json, or text files only")
        return chat_prefix(tokenizer, parse_messages(parts[0]), tools=tools, date=date)
    if system:
        return chat_prefix(tokenizer, [{"role": "system", "content": "".join(parts)}], parts, tools, date)
    if tools:
        raise BadInput("tools need a chat; build from chat messages or with --system")
    text = "".join(parts)
    tokens = tokenizer.encode(text, add_bos=True)
    *offset, n = _offset(tokenizer, tokens, text, parts)
    if n - 1 == offset[-1]:
        raise BadInput(
            "the last part of the prefix has a single token, which stays live, so nothing is left to build from; make it longer"
        )
    return Prefix(tokens[:-1], text, offset=[*offset, n - 1])  # see held_back


def held_back(tokenizer, prefix: Prefix) -> list[int]:
    """The last tokens of a prefix's text that its memory leaves out; they are live at the beginning of every prompt.

    A memory of text leaves out one token, because the model needs a live token to continue from, even if the prompt is empty.
    None for chats, which always bring live tokens, and for memories of older builds.
    """
    if prefix.messages is not None:
        return []
    tokens = tokenizer.encode(prefix.text, add_bos=True)
    n = len(prefix.tokens)
    return tokens[n:] if tokens[:n] == prefix.tokens else []


def chat_prefix(
    tokenizer, messages: list[dict], parts: Sequence[str] = (), tools: list[dict] | None = None, date: str | None = None
) -> Prefix:
    """A prefix of chat messages, rendered with the model's template up to where the next message begins.

    parts: the texts that make up the first message; each becomes a segment.
    date: the time for templates that write it, in ISO format.  [default: now]
    Raises BadInput for messages that are malformed or empty, or that the template refuses or leaves out; Unsupported for a
    template that moves or changes these messages as the chat goes on.
    """
    template = tokenizer.template
    messages = normalised(messages)
    check_json(messages, "the chat messages")
    tools = checked_tools(tools) if tools else None
    if not tools and not any(m["content"] or m.get("tool_calls") for m in messages):
        raise BadInput("the chat messages of the prefix are empty")
    date = date or datetime.now().isoformat(timespec="seconds")

    def text(*more: dict, messages: list[dict] = messages, tools=tools, add_generation_prompt: bool = True) -> str:
        return template.render([*messages, *more], tools, date, add_generation_prompt)

    try:
        chats = [text(_user("A")), text(_user("9"))]
    except BadInput as error:
        raise _refused(template, messages, error) from None
    if text(_user("A")) != chats[0]:
        raise Unsupported("the chat template of the model writes another text each time, so a memory cannot stand for it")
    opening = commonprefix(chats)  # the text before the user's message
    for probe in _PROBES[2:]:
        try:
            chats.append(text(_user(probe)))
        except BadInput:
            continue  # some templates refuse an empty message
    messages_end = _messages_end(text, messages, tools, chats[0])
    if messages_end > len(opening):
        raise Unsupported(f"the chat template of the model writes a part of the prefix after the user's message; {_WAY_OUT}")

    tokens, end = _end(tokenizer, opening, messages_end, [tokenizer.encode(chat, add_bos=False) for chat in chats])
    prefix = Prefix(tokens, opening[:end], messages, _offset(tokenizer, tokens, opening[:end], parts), tools)
    if any(not chat.startswith(prefix.text) for chat in template.on_other_days([*messages, _user("A")], tools)):
        prefix.date = date
    _check_stays(text, prefix)
    return prefix


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _messages_end(text, messages: list[dict], tools: list[dict] | None, chat: str) -> int:
    """The number of characters of a rendered chat up to the end of the prefix's messages and tools.

    chat: the messages and one of a user, "A", as text() renders them.
    Raises BadInput for messages, and warns of tool calls, that the template leaves out.
    """
    with_marks, tools_with_marks, descriptions = marked(messages, tools)
    marked_chat = text(_user("A"), messages=with_marks, tools=tools_with_marks)
    for mark, description in descriptions.items():
        if mark in marked_chat:
            continue
        if description.startswith("the tool calls"):
            _log.warning("the chat template of the model does not write %s", description)
            continue
        way_out = f"; {_WAY_OUT}" if "'system'" in description else ""
        raise BadInput(f"the chat template of the model does not write {description}, so the memory would not have it{way_out}")
    return len(chat) - len(commonprefix([marked_chat[::-1], chat[::-1]]))  # after the last mark, both are equal


def _end(tokenizer, opening: str, messages_end: int, chats: list[list[int]]) -> tuple[list[int], int]:
    """Where to end the prefix so that every chat begins with its tokens: the tokens, and the number of characters.

    opening: the text before the user's message; its first messages_end characters contain all of the prefix's messages.
    chats: tokens of chats that go on differently.
    The best end is after the last special token behind the messages, as no text merges across it. Otherwise it is the latest end
    on which all chats agree, and live text is tokenized from there. Raises Unsupported if there is none.
    """
    latest = None
    for end in range(len(opening), max(0, len(opening) - _SEARCHED) - 1, -1):
        if end < messages_end and latest:
            break
        tokens = tokenizer.encode(opening[:end], add_bos=False)
        if not tokens or any(chat[: len(tokens)] != tokens for chat in chats):
            continue
        if end >= messages_end and tokenizer.is_special(tokens[-1]):
            return tokens, end
        latest = latest or (tokens, end)
    if latest is None:
        raise Unsupported(
            "the tokens at the end of the prefix depend on the user's message, whatever its end, so a memory cannot stand for them"
        )
    return latest


def _check_stays(text, prefix: Prefix) -> None:
    """Raises Unsupported if the rendered text of a longer chat no longer begins with the prefix."""
    turns = [_user("A"), _assistant("B"), _user("C"), _assistant("D"), _user("E")]
    for n in range(1, len(turns) + 1):
        try:
            later = text(*turns[:n], add_generation_prompt=n % 2 == 1)
        except BadInput as error:
            if n % 2 == 0:
                continue  # some templates refuse a chat that ends with the assistant's message
            raise Unsupported(f"a chat cannot go on after the prefix: {error}") from None
        if later.startswith(prefix.text):
            continue
        raise Unsupported(
            f"the chat template of the model moves the prefix once the chat goes on: after {n} more messages, the text no longer "
            f"begins with it (templates of Mistral write the system message into the user's last message); {_WAY_OUT}"
        )


def _refused(template, messages: list[dict], error: BadInput) -> BadInput:
    """The error for a template that refuses a user's message after the prefix: why, and the way out."""

    def takes(*chat: dict) -> bool:
        try:
            template.render(list(chat))
        except BadInput:
            return False
        return True

    if (
        any(m["role"] == "system" for m in messages)
        and takes(_user("A"))
        and not takes({"role": "system", "content": "S"}, _user("A"))
    ):
        return BadInput(f"this model takes no system message; {_WAY_OUT} ({error})")
    if messages and messages[-1]["role"] == "user" and takes(*messages, _assistant("OK"), _user("A")):
        return BadInput(
            "the prefix ends with a user's message, and the next message comes from the user, too; "
            f"end it with an answer of the assistant ({error})"
        )
    return error


def _offset(tokenizer, tokens: list[int], text: str, parts: Sequence[str]) -> list[int]:
    """Where the parts of a text begin and end in its tokens, [n_parts + 1]; a token across a border belongs to the earlier part.

    parts: none for a single one. Raises BadInput for a part without a token.
    """
    offset = [0]
    if len(parts) > 1:
        whole = "".join(parts)
        border = text.find(whole.strip()) - (len(whole) - len(whole.lstrip()))  # in characters; templates strip messages
        border += len(tokenizer.decode(tokens)) - len(text)  # BOS, and the space that some tokenizers put before a text
        for part in parts[:-1]:
            border += len(part)
            offset.append(
                bisect.bisect_left(range(len(tokens)), border, lo=offset[-1], key=lambda n: len(tokenizer.decode(tokens[:n])))
            )
    if len({*offset, len(tokens)}) != len(offset) + 1:
        raise BadInput("a part of the prefix is empty; give each part some text, or leave it out")
    return [*offset, len(tokens)]
