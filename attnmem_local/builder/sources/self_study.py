"""Self-study: the model itself writes summaries, questions and answers about the prefix (Cartridges, arXiv 2506.06266)."""

import math
from typing import TYPE_CHECKING

import torch

from ...memory.prefix import Prefix
from ...prompt.live import live_chat, live_prompt
from ..capture import Live
from ..job import effort
from ..model import BuildModel

if TYPE_CHECKING:
    from ..job import Build

STUDY_WINDOW = 192  # tokens per window about a long prefix: many short windows are written faster than few long ones
STUDY_WINDOWS = 24  # windows about a long prefix; twice as many gained nothing (docs/quality.md)

_REQUESTS = (
    "Summarize the text above.",
    "Write down ten questions that the text above answers, each with its answer.",
    "What are the most important facts above? List them with all names and numbers.",
    "Explain in your own words, and in detail, what is said above.",
    "Quote the most important passage above word by word.",
    "Which rules, options or instructions are given above? Give an example for each.",
    "Ask me something difficult about the text above, then answer it step by step.",
    "Continue with more text in the same style.",
)


class SelfStudy:
    is_real = False

    def __init__(self, query: str, build: "Build"):
        self.name = query
        self.written = study_shape(sum(build.segment_tokens()), build.study_windows)
        self.n_tokens = math.prod(self.written)

    def windows(self, build: "Build") -> list[list[int]]:
        return self_study(build, *self.written)


def study_shape(n_tokens: int, windows: int | None = None) -> tuple[int, int]:
    """The number of windows that self-study writes about a prefix of n_tokens, and the tokens of each.

    A short prefix gets shorter windows rather than fewer: all advance together, so their length is what takes the time.
    """
    return windows or round(STUDY_WINDOWS * effort(n_tokens, 5 / 6)), round(STUDY_WINDOW * effort(n_tokens, 1 / 2))


def self_study(build: "Build", n_windows: int, window: int) -> list[list[int]]:
    """Windows of `window` tokens: a request about the prefix, and the answer that the model samples at temperature 1."""
    generator = torch.Generator().manual_seed(build.seed)
    prompts = [_prompt(build.model, build.prefix, _REQUESTS[i % len(_REQUESTS)])[:window] for i in range(n_windows)]
    n = min(map(len, prompts))
    tokens = torch.tensor([prompt[:n] for prompt in prompts])
    session = Live(build.kv.state)
    with build.progress.stage("self-study", n_windows * window) as step:
        logits = session.run(build.model, tokens)[:, -1]
        step(tokens.numel())
        while tokens.shape[1] < window:
            drawn = draw(logits, generator)
            for row, prompt in zip(drawn, prompts):  # all rows advance together: longer prompts are still being read
                if len(prompt) > tokens.shape[1]:
                    row[0] = prompt[tokens.shape[1]]
            tokens = torch.cat((tokens, drawn), dim=1)
            logits = session.run(build.model, drawn)[:, -1]
            step(n_windows)
    return tokens.tolist()


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token [n, 1] for each row of logits [n, n_vocab], at temperature 1."""
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)


def _prompt(model: BuildModel, prefix: Prefix, request: str) -> list[int]:
    if prefix.messages is None:
        return live_prompt(model.tokenizer, prefix, f"\n\n{request}\n\n")
    return live_chat(model.tokenizer, prefix, [{"role": "user", "content": request}])
