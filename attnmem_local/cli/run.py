"""attnmem run"""

import sys
from pathlib import Path

import click

from ..prompt.texts import decode
from .answer import Answer, open_llama
from .common import ctx_option, memory_option, model_argument, positive, temp_option, threads_option


@click.command()
@model_argument
@memory_option
@click.argument("prompt")
@click.option("-n", "--predict", type=positive, default=256, show_default=True, help="Tokens to generate at most.")
@temp_option(0.0)
@threads_option
@ctx_option
def run(model: Path, memories: tuple[Path, ...], prompt: str, predict: int, temp: float, threads: int | None, ctx: int) -> None:
    """Answer PROMPT with memories attached; "-" reads it from standard input.

    With a memory of a chat PROMPT is the user's message; with a memory of text it is how the text goes on.
    An answer that was cut says so on standard error.
    """
    if prompt == "-":
        prompt = decode(sys.stdin.buffer.read(), "standard input")
    else:
        prompt = decode(prompt.encode("utf-8", "surrogateescape"), "PROMPT")
    llama = open_llama(model, memories, ctx, threads)
    options = {"stream": True, "max_tokens": predict, "temperature": temp}
    if llama.memories[0].memory.prefix_messages is not None:
        chunks = llama.create_chat_completion([{"role": "user", "content": prompt}], **options)
    else:
        chunks = llama.create_completion(prompt, **options)
    answer = Answer(llama)
    answer.write(chunks)
    click.echo()
    answer.say_if_cut()
