"""Recognising the prefix of a memory in a live prompt, and tokenizing the rest.

Texts are compared rather than tokens, because tokens may merge at the seam, and because memories of older builds end at another
token. The text after the prefix is tokenized by itself, as it was when the memory was built.
"""

from ..memory.errors import BadInput, PrefixMismatch
from ..memory.messages import USUAL_ROLES, marked, normalised, tool_names
from ..memory.prefix import Prefix
from .prefix import held_back

_BEFORE, _AFTER = 16, 32  # number of characters that a message shows before and after a difference


def live_chat(
    tokenizer, prefix: Prefix, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = True, **options
) -> list[int]:
    """Tokens of a chat after the prefix; the messages and tools of the prefix may be repeated or left out.

    options: further variables of the request for the template.
    Raises BadInput for a malformed chat, or one that the template refuses; PrefixMismatch, which says what differs, if the chat
    does not begin with the prefix.
    """
    messages = normalised(messages)
    template = tokenizer.template
    if tools and prefix.tools and tools != prefix.tools:
        raise PrefixMismatch(
            f"the tools differ: the memory was built with {tool_names(prefix.tools)}, the chat has {tool_names(tools)}: "
            f"{_difference(repr(prefix.tools), repr(tools))}; leave them out of the chat, and those of the memory are used, "
            "or build a memory with the tools of the chat"
        )
    tools = prefix.tools or tools or None

    def render(chat: list[dict], tools=tools) -> str:
        return template.render(chat, tools, prefix.date, add_generation_prompt, **options)

    mismatch = None
    try:
        chat = with_prefix_messages(messages, prefix.messages or [])
    except PrefixMismatch as error:
        chat, mismatch = messages, error
    # messages that differ from those of the prefix may still be rendered to the same text
    for candidate in [chat, messages] if chat is not messages else [chat]:
        try:
            text = render(candidate)
        except BadInput:
            if candidate is chat and not mismatch:
                raise
            break
        if (tokens := _after(tokenizer, prefix, text)) is not None:
            _check_roles(render, candidate)
            return tokens
    if mismatch:
        raise mismatch
    raise _mismatch(tokenizer, prefix, chat, tools, render)


def live_prompt(tokenizer, prefix: Prefix, prompt: str | list[int]) -> list[int]:
    """Tokens of a prompt after the prefix, which the prompt may continue or repeat.

    Raises BadInput if nothing is left: a memory that covers all of its text leaves no live token to continue from.
    """
    if not isinstance(prompt, str) and prompt[: len(prefix.tokens)] == prefix.tokens:
        live = prompt[len(prefix.tokens) :] or held_back(tokenizer, prefix)
    else:
        text = _rest(prompt if isinstance(prompt, str) else tokenizer.decode(prompt), prefix.text, tokenizer.bos)
        rest = prompt if text is None else text
        held = held_back(tokenizer, prefix)
        live = held + (tokenizer.encode_after(rest, prefix.tokens + held) if isinstance(rest, str) else rest)
    if not live:
        raise BadInput(
            "the prompt adds nothing to the prefix, and the memory covers the prefix to its last token; "
            "add to the prompt, or build the memory again"
        )
    return live


def with_prefix_messages(messages: list[dict], prefix_messages: list[dict]) -> list[dict]:
    """The whole chat: the prefix's messages, then the live ones without repetition.

    The live messages may repeat all of the prefix's messages, its system messages alone, or none.
    Raises PrefixMismatch if the live messages begin with other system messages.
    """
    if _same(messages[: len(prefix_messages)], prefix_messages):
        return [*prefix_messages, *messages[len(prefix_messages) :]]
    systems, prefix_systems = _systems(messages), _systems(prefix_messages)
    if _same(systems, prefix_systems[: len(systems)]):
        return [*prefix_messages, *messages[len(systems) :]]
    if not prefix_systems:
        first = prefix_messages[0]
        raise PrefixMismatch(
            f"the chat has a system message, {_short(systems[0])}, but the memory holds none: "
            f"its prefix begins with a message of the role '{first['role']}', {_short(first)}; "
            "leave the system message out, or build a memory that begins with it"
        )
    pairs = zip(prefix_systems, systems)
    ours, theirs = next(((ours, theirs) for ours, theirs in pairs if not _same([ours], [theirs])), (None, systems[-1]))
    difference = _difference(ours["content"], theirs["content"]) if ours else f"the chat goes on with {_short(theirs)}"
    raise PrefixMismatch(
        f"the chat has a system message, but the memory holds another one: {difference}; "
        "leave it out, repeat that of the memory, detach the memory, or build one with this message"
    )


def _after(tokenizer, prefix: Prefix, text: str) -> list[int] | None:
    """Tokens of a text, which includes BOS, after the prefix; None if the text does not begin with the prefix."""
    if prefix.text and text.startswith(prefix.text):
        held = held_back(tokenizer, prefix)
        return held + tokenizer.encode_after(text[len(prefix.text) :], prefix.tokens + held)
    tokens = tokenizer.encode(text, add_bos=False)  # prefix.text may be inexact, as where the prefix was given as tokens
    return tokens[len(prefix.tokens) :] if tokens[: len(prefix.tokens)] == prefix.tokens else None


def _rest(text: str, prefix: str, bos: str) -> str | None:
    """The text after a prefix; None if the text does not begin with it. BOS before it and CR LF line endings are tolerated."""
    if not prefix:
        return None
    for candidate in (text, text.removeprefix(bos)):
        if candidate.startswith(prefix):
            return candidate[len(prefix) :]
        *prefix_lines, last = prefix.replace("\r\n", "\n").split("\n")
        *lines, rest = candidate.split("\n", len(prefix_lines))
        if [line.removesuffix("\r") for line in lines] == prefix_lines and rest.startswith(last):
            return rest[len(last) :]
    return None


def _same(a: list[dict], b: list[dict]) -> bool:
    """Whether two lists have the same messages, by the fields that most templates write: role, content and tool calls."""

    def written(messages):
        return [(m["role"], m["content"] or "", m.get("tool_calls") or None) for m in messages]

    return written(a) == written(b)


def _systems(messages: list[dict]) -> list[dict]:
    """The system messages at the beginning of a chat."""
    return messages[: next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))]


def _check_roles(render, chat: list[dict]) -> None:
    """Raises BadInput for a message with an unusual role that the template leaves out, as the model would never see it."""
    if all(m["role"] in USUAL_ROLES for m in chat):
        return
    with_marks, _, descriptions = marked(chat, None)
    text = render(with_marks)
    for mark, description in descriptions.items():
        if mark not in text and not any(f"'{role}'" in description for role in USUAL_ROLES):
            raise BadInput(f"the chat template of the model does not write {description}; use one of {', '.join(USUAL_ROLES[:4])}")


def _mismatch(tokenizer, prefix: Prefix, chat: list[dict], tools, render) -> PrefixMismatch:
    """The error for a rendered chat that does not begin with the prefix: what differs, why, and the remedy."""
    difference = _difference(prefix.text, render(chat))

    def fits(chat: list[dict], tools=tools) -> bool:
        try:
            return _after(tokenizer, prefix, render(chat, tools)) is not None
        except BadInput:
            return False

    if prefix.messages is None:
        return PrefixMismatch(
            f"the memory was built from plain text, which this chat does not begin with: {difference}; "
            "for chat, build it from chat messages or with --system"
        )
    if tools and not prefix.tools and fits(chat, tools=None):
        return PrefixMismatch(
            f"the tools differ: the memory was built with none, the chat has {tool_names(tools)}, "
            f"and the chat template writes them into the prefix: {difference}; leave them out, or build the memory with --tools"
        )
    if prefix.date is None and len(set(tokenizer.template.on_other_days(chat, tools))) > 1:
        return PrefixMismatch(
            "the date differs: the chat template writes today's date into the prefix, "
            f"and this memory does not say when it was built: {difference}; build it again"
        )
    if fits([*prefix.messages, {"role": "user", "content": "A"}]):
        following = next((f"one with the role '{m['role']}'" for m in chat[len(prefix.messages) :]), "missing")
        return PrefixMismatch(
            "the prefix of the memory includes the beginning of a user's message, but the next message of the chat is "
            f"{following}: {difference}; begin with a message of the user, or build the memory again"
        )
    return PrefixMismatch(
        "the chat template differs: it no longer writes the messages of the prefix as it did when the memory was built: "
        f"{difference}; use the model file that the memory was built with, or build it again"
    )


def _difference(memory: str, chat: str) -> str:
    """Excerpts of both texts around the first character that differs."""
    first = next((i for i, (a, b) in enumerate(zip(memory, chat)) if a != b), min(len(memory), len(chat)))
    begin, end = max(0, first - _BEFORE), first + _AFTER

    def excerpt(text: str) -> str:
        return repr("…" * (begin > 0) + text[begin:end] + "…" * (end < len(text)))

    return f"the memory has {excerpt(memory)}, the chat {excerpt(chat)}"


def _short(message: dict) -> str:
    """The beginning of a message's content, quoted."""
    content = message["content"] or ""
    return repr(content[:_AFTER] + "…" * (len(content) > _AFTER))
