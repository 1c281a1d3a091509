"""The prefix that a memory stands for."""

from dataclasses import dataclass, field


@dataclass
class Prefix:
    tokens: list[int]
    text: str
    messages: list[dict] | None = None  # the chat messages that the text was rendered from
    offset: list[int] = field(default_factory=list)  # segment s holds tokens[offset[s]:offset[s + 1]]; default: one segment
    tools: list[dict] | None = None  # the tools that were rendered with the messages
    date: str | None = None  # ISO format, the time of rendering if the text depends on it

    def __post_init__(self):
        self.offset = self.offset or [0, len(self.tokens)]
