"""The prefix that a memory stands for."""

from dataclasses import dataclass, field


@dataclass
class Prefix:
    tokens: list[int]
    text: str
    messages: list[dict] | None = None
    offset: list[int] = field(default_factory=list)  # segment s holds tokens[offset[s]:offset[s + 1]]
    tools: list[dict] | None = None  # in the text of the messages
    date: str | None = None  # ISO format; the time that the text was rendered at, if it tells

    def __post_init__(self):
        self.offset = self.offset or [0, len(self.tokens)]
