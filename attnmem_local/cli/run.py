"""attnmem run"""

import sys
from pathlib import Path

import click

from .common import ctx_option, memory_option, model_argument, threads_option


@click.command()
@model_argument
@memory_option
@click.argument("prompt")
@click.option("-n", "--predict", default=256, show_default=True, help="Tokens to generate at most.")
@click.option("--temp", default=0.0, show_default=True, help="Sampling temperature.")
@threads_option
@ctx_option
def run(model: Path, memories: tuple[Path, ...], prompt: str, predict: int, temp: float, threads: int | None, ctx: int) -> None:
    """Answer PROMPT with memories attached; "-" reads it from standard input.

    With a memory of a chat PROMPT is the user's message; with a memory of text it is how the text goes on.
    """
    from ..runtime import MemoryLlama

    llama = MemoryLlama(str(model), memory=memories, n_ctx=ctx, n_threads=threads, verbose=False)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    for piece in answer(llama, prompt, max_tokens=predict, temperature=temp):
        click.echo(piece, nl=False)
    click.echo()


def answer(llama, prompt: str, **options):
    """Pieces of the answer: of a chat turn if the first memory holds a chat, of a completion if it holds text."""
    if llama.memories[0].memory.prefix_messages is not None:
        for chunk in llama.create_chat_completion([{"role": "user", "content": prompt}], stream=True, **options):
            yield chunk["choices"][0]["delta"].get("content", "")
    else:
        for chunk in llama.create_completion(prompt, stream=True, **options):
            yield chunk["choices"][0]["text"]
