"""The command line, one file per command."""

import click

from .build import build
from .chat import chat
from .common import Group
from .demo import demo
from .evaluate import evaluate
from .list import list_
from .run import run
from .show import show
from .update import update


@click.group("attnmem", cls=Group)
@click.version_option(package_name="attnmem-local")
def main() -> None:
    """Attention-state memory for llama.cpp: a long prefix for the price of none.

    A MEMORY and a model are given by name or by file: "handbook" is a memory that `attnmem build` wrote, "default" is the
    model that comes with attnmem. `attnmem list` shows the names. The environment variable ATTNMEM_HOME moves the folder that
    memories and models are kept in.
    """


for command in (build, run, chat, list_, show, update, evaluate, demo):
    main.add_command(command)
