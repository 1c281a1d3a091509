"""A prefix from text or chat messages.

A prefix may be made of several parts, files say; each is a segment of its memory, which can be rebuilt alone. The
prefix owns BOS and the system turn.
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

# What a user's message may begin with. Only the first ones matter where the template ends in a special token.
_PROBES = (
    *("A", "9", "\n", "\n\nx", " x", "    x", "\t", "\r\n", ".", "'s", '"', ")", "/", "-", "é", "。", "🙂"),
    *("<|im_end|>", "[/INST]", ""),
)
_SEARCHED = 256  # characters before the user's message
_WAY_OUT = 'give the text as a .json of chat messages: [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "OK"}]'


def read_prefix(
    tokenizer, paths: list[str | Path], system: bool = False, tools: list[dict] | None = None, date: str | None = None
) -> Prefix:
    """A prefix from files: one `.json` with chat messages, or parts of a text (with `system`, of the system message)."""
    parts = [read_text(path) for path in paths]
    if Path(paths[0]).suffix.lower() == ".json":
        if len(paths) > 1:
            raise BadInput("chat messages cannot be one of several parts; give one .json, or text files")
        return chat_prefix(tokenizer, parse_messages(parts[0]), tools=tools, date=date)
    if system:
        return chat_prefix(tokenizer, [{"role": "system", "content": "".join(parts)}], parts, tools, date)
    if tools:
        raise BadInput("tools belong to a chat: build from chat messages or with --system")
    text = "".join(parts)
    tokens = tokenizer.encode(text, add_bos=True)
    *offset, n = _offset(tokenizer, tokens, text, parts)
    if n - 1 == offset[-1]:
        raise BadInput("the last part of the prefix has one token; a memory of text needs two, as the last one stays live")
    return Prefix(tokens[:-1], text, offset=[*offset, n - 1])  # see held_back


def held_back(tokenizer, prefix: Prefix) -> list[int]:
    """Tokens of the text of a prefix that its memory does not stand for, and which are live at the beginning of every prompt.

    A memory of text leaves out the last token: the model needs a live one to go on from, even if the prompt adds nothing.
    A chat always brings live tokens. Empty for chats, and for memories of text that were built before.
    """
    if prefix.messages is not None:
        return []
    tokens = tokenizer.encode(prefix.text, add_bos=True)
    n = len(prefix.tokens)
    return tokens[n:] if tokens[:n] == prefix.tokens else []


def chat_prefix(
    tokenizer, messages: list[dict], parts: Sequence[str] = (), tools: list[dict] | None = None, date: str | None = None
) -> Prefix:
    """Render messages with the model's own template, up to where the next message begins.

    parts: texts that together are the first message. date: when, in ISO format, for templates that tell.  [default: now]
    Raises BadInput for messages that are not any, or that the template refuses or leaves out; Unsupported for a template
    that writes the messages elsewhere, or otherwise, once the chat goes on.
    """
    template = tokenizer.template
    messages = normalised(messages)
    check_json(messages, "the chat messages")
    tools = checked_tools(tools) if tools else None
    if not tools and not any(m["content"] or m.get("tool_calls") for m in messages):
        raise BadInput("the chat messages of the prefix are empty")
    date = date or datetime.now().isoformat(timespec="seconds")

    def text(*more: dict, own: list[dict] = messages, own_tools=tools, add_generation_prompt: bool = True) -> str:
        return template.render([*own, *more], own_tools, date, add_generation_prompt)

    try:
        chats = [text(_user("A")), text(_user("9"))]
    except BadInput as error:
        raise _refused(template, messages, error) from None
    if text(_user("A")) != chats[0]:
        raise Unsupported("the chat template of the model writes another text each time, which no memory can know beforehand")
    opening = commonprefix(chats)  # what the template writes before the user's message
    for probe in _PROBES[2:]:
        try:
            chats.append(text(_user(probe)))
        except BadInput:
            continue  # there are templates that refuse an empty message
    with_marks, tools_with_marks, what = marked(messages, tools)
    chat = text(_user("A"), own=with_marks, own_tools=tools_with_marks)
    _check_written(chat, what)
    after = len(commonprefix([chat[::-1], chats[0][::-1]]))  # characters that come after the last of the prefix
    if len(chats[0]) - after > len(opening):
        raise Unsupported(f"the chat template of the model writes a part of the prefix after the user's message; {_WAY_OUT}")

    own_end = len(chats[0]) - after
    encoded = [tokenizer.encode(chat, add_bos=False) for chat in chats]
    tokens, end = _end(tokenizer, opening, own_end, encoded)
    prefix = Prefix(tokens, opening[:end], messages, _offset(tokenizer, tokens, opening[:end], parts), tools)
    if any(not chat.startswith(prefix.text) for chat in template.on_other_days([*messages, _user("A")], tools)):
        prefix.date = date
    _check_stays(text, prefix)
    return prefix


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _end(tokenizer, opening: str, own_end: int, chats: list[list[int]]) -> tuple[list[int], int]:
    """Where the prefix ends so that its tokens are those of every chat: tokens, characters.

    opening: the text before the user's message; its first own_end characters hold all of the prefix's messages.
    After the last special token behind them, if there is one: nothing that follows can merge with what precedes it. Else as late
    as all chats agree; text that merges otherwise is then tokenized from there on.
    """
    latest = None
    for end in range(len(opening), max(0, len(opening) - _SEARCHED) - 1, -1):
        if end < own_end and latest:
            break
        tokens = tokenizer.encode(opening[:end], add_bos=False)
        if not tokens or any(chat[: len(tokens)] != tokens for chat in chats):
            continue
        if end >= own_end and tokenizer.is_special(tokens[-1]):
            return tokens, end
        latest = latest or (tokens, end)
    if latest is None:
        raise Unsupported("the text of the prefix has no end that every message of a user could follow without changing its tokens")
    return latest


def _check_written(chat: str, what: dict[str, str]) -> None:
    """Raises BadInput for messages, and warns of tool calls, that the template has left out."""
    for mark, subject in what.items():
        if mark in chat:
            continue
        if subject.startswith("the tool calls"):
            _log.warning("the chat template of the model does not write %s", subject)
            continue
        way_out = f"; {_WAY_OUT}" if "'system'" in subject else ""
        raise BadInput(f"the chat template of the model does not write {subject}: the memory would know nothing of it{way_out}")


def _check_stays(text, prefix: Prefix) -> None:
    """Raises Unsupported if a chat does not begin with the prefix once it goes on."""
    turns = [_user("A"), _assistant("B"), _user("C"), _assistant("D"), _user("E")]
    for n in range(1, len(turns) + 1):
        try:
            later = text(*turns[:n], add_generation_prompt=n % 2 == 1)
        except BadInput as error:
            if n % 2 == 0:
                continue  # there are templates that refuse a chat in which it is not the user's turn
            raise Unsupported(f"a chat that goes on after the prefix: {error}") from None
        if later.startswith(prefix.text):
            continue
        raise Unsupported(
            f"the chat template of the model moves the prefix once the chat goes on: after {n} messages it does not begin with it "
            f"any more (templates of Mistral write the system message into the user's last message); {_WAY_OUT}"
        )


def _refused(template, messages: list[dict], error: ValueError) -> ValueError:
    """Why the template refuses a user's message after the prefix, and the way out."""

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
        return ValueError(f"this model takes no system message; {_WAY_OUT} ({error})")
    if messages and messages[-1]["role"] == "user" and takes(*messages, _assistant("OK"), _user("A")):
        return ValueError(
            "the prefix ends with a user's message, and the next one comes from the user, too; "
            f"end it with an answer of the assistant ({error})"
        )
    return error


def _offset(tokenizer, tokens: list[int], text: str, parts: Sequence[str]) -> list[int]:
    """Where the parts of a text begin and end in its tokens; a token across a border belongs to the part before."""
    offset = [0]
    if len(parts) > 1:
        whole = "".join(parts)
        at = text.find(whole.strip()) - (len(whole) - len(whole.lstrip()))  # templates strip messages
        at += len(tokenizer.decode(tokens)) - len(text)  # BOS, and a space that some tokenizers put before a text
        for part in parts[:-1]:
            at += len(part)
            offset.append(
                bisect.bisect_left(range(len(tokens)), at, lo=offset[-1], key=lambda n: len(tokenizer.decode(tokens[:n])))
            )
    if len({*offset, len(tokens)}) != len(offset) + 1:
        raise BadInput("a part of the prefix is empty")
    return [*offset, len(tokens)]
