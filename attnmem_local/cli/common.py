"""What all commands share: the default model, options that read the same everywhere, errors without tracebacks."""

from pathlib import Path

import click

from ..chat import parse_tools

DEFAULT_MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


class Group(click.Group):
    """Shows the errors that bad input causes as one line, and leaves those of the program as they are."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except (OSError, ValueError, OverflowError) as error:
            raise click.ClickException(str(error)) from error


class _Tools(click.ParamType):
    name = "file"

    def convert(self, value, param, context) -> list[dict]:
        try:
            return parse_tools(Path(value).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            self.fail(f"'{value}': {error}", param, context)


class _Model(click.ParamType):
    name = "model"

    def convert(self, value, param, context) -> Path:
        path = DEFAULT_MODEL if value == "default" else Path(value)
        if not path.exists():
            hint = "; run ./build.sh to fetch it" if value == "default" else ""
            self.fail(f"there is no model at '{path}'{hint}", param, context)
        return path


model_argument = click.argument("model", type=_Model())
file_type = click.Path(exists=True, dir_okay=False, path_type=Path)
memory_option = click.option(
    "-m", "--memory", "memories", multiple=True, required=True, type=file_type, help="A memory to attach; may be given several times."
)
threads_option = click.option("-t", "--threads", type=int, help="CPU threads.")
ctx_option = click.option("-c", "--ctx", default=4096, show_default=True, help="Live tokens that fit into the context.")
tools_option = click.option("--tools", type=_Tools(), help="A .json with the tools of the chat, as OpenAI clients send them; they become part of the prefix.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
queries_option = click.option(
    "-q",
    "--queries",
    multiple=True,
    default=("repeat", "self-study"),
    show_default=True,
    help="Where queries come from: repeat, self-study, or a file of traces (text, or .jsonl with text or messages). May be given several times.",
)


def print_seconds(progress) -> None:
    """How long each stage took, and the most memory that the tensors took on GPUs."""
    import torch

    click.echo(", ".join(f"{name} {seconds:.1f} s" for name, seconds in progress.seconds.items()) + f": {sum(progress.seconds.values()):.0f} s")
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        click.echo(f"peak GPU memory {peak / 1e9:.1f} GB")
