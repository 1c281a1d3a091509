"""attnmem chat"""

from pathlib import Path

import click

from .common import ctx_option, memory_option, model_argument, threads_option


@click.command()
@model_argument
@memory_option
@click.option("--temp", default=0.2, show_default=True, help="Sampling temperature.")
@threads_option
@ctx_option
def chat(model: Path, memories: tuple[Path, ...], temp: float, threads: int | None, ctx: int) -> None:
    """Chat with memories attached. An empty line or Ctrl-D ends the chat."""
    from ..runtime import MemoryLlama

    llama = MemoryLlama(str(model), memory=memories, n_ctx=ctx, n_threads=threads, verbose=False)
    messages: list[dict] = []
    while line := _read():
        messages.append({"role": "user", "content": line})
        text = ""
        for chunk in llama.create_chat_completion(messages, stream=True, temperature=temp):
            piece = chunk["choices"][0]["delta"].get("content", "")
            click.echo(piece, nl=False)
            text += piece
        click.echo()
        messages.append({"role": "assistant", "content": text})


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
