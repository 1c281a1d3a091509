"""The command line, one file per command."""

import click

from .build import build
from .chat import chat
from .common import Group
from .demo import demo
from .evaluate import evaluate
from .run import run
from .show import show
from .update import update


@click.group(cls=Group)
@click.version_option(package_name="attnmem-local")
def main() -> None:
    """Attention-state memory for llama.cpp: a long prefix for the price of none.

    MODEL is a GGUF file, or the word "default" for the model in models/.
    """


for command in (build, update, show, run, chat, evaluate, demo):
    main.add_command(command)
