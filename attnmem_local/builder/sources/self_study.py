"""Self-study: the model itself writes summaries, questions and answers about the prefix (Cartridges, arXiv 2506.06266)."""

from collections.abc import Callable

import torch

from ...memory.prefix import Prefix
from ...prompt.live import live_chat, live_prompt
from ..capture import Live, PrefixKV

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


def self_study(
    model,
    prefix: Prefix,
    kv: PrefixKV,
    n_windows: int,
    window: int,
    seed: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[list[int]]:
    """Windows of `window` tokens: a request about the prefix and what the model samples after it (temperature 1)."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [_prompt(model, prefix, _REQUESTS[i % len(_REQUESTS)])[:window] for i in range(n_windows)]
    n = min(map(len, prompts))
    tokens = torch.tensor([prompt[:n] for prompt in prompts])
    session = Live(kv.state)
    logits = session.run(model, tokens)[:, -1]
    progress(tokens.numel())
    while tokens.shape[1] < window:
        drawn = draw(logits, generator)
        for row, prompt in zip(drawn, prompts):  # all rows advance together: longer prompts are still being read
            if len(prompt) > tokens.shape[1]:
                row[0] = prompt[tokens.shape[1]]
        tokens = torch.cat((tokens, drawn), dim=1)
        logits = session.run(model, drawn)[:, -1]
        progress(n_windows)
    return tokens.tolist()


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token [n, 1] for each row of logits [n, n_vocab], at temperature 1."""
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)


def _prompt(model, prefix: Prefix, request: str) -> list[int]:
    if prefix.messages is None:
        return live_prompt(model.tokenizer, prefix, f"\n\n{request}\n\n")
    return live_chat(model.tokenizer, prefix, [{"role": "user", "content": request}])
