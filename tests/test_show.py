"""What attnmem show prints of any file that is a memory."""

import json
import re

import pytest
from click.testing import CliRunner

from attnmem_local.cli import main

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def show(*args):
    return CliRunner().invoke(main, ["show", *map(str, args)], catch_exceptions=False)


def test_a_prefix_in_brackets_is_no_markup(tiny):
    memory = tiny.exact()
    memory.prefix_text = "[INST] What is [red]red[/red]? [/INST] A colour."
    memory.build["[/x]"] = "[bold]"
    shown = show(tiny.save(memory, "brackets"))
    assert shown.exit_code == 0 and "[INST] What is [red]red[/red]? [/INST]" in shown.output and "[bold]" in shown.output


def test_text_of_a_file_does_not_control_the_terminal(tiny):
    memory = tiny.exact()
    evil = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066"
    memory.prefix_text, memory.build = evil, {"\x1b[31mkey": evil, "model": evil}
    path = tiny.save(memory, "evil-\x1b[31m")
    shown = show(path)
    assert shown.exit_code == 0 and not UNSAFE.search(shown.output) and r"\x1b[2J" in shown.output and "\\x07" in shown.output
    assert json.loads(show(path, "--json").output)["prefix_text"] == evil
    path.write_bytes(b"damaged")
    refused = show(path)
    assert refused.exit_code != 0 and not UNSAFE.search(refused.output) and "not a GGUF file" in refused.output


MEASURED = {"kl_mean": 0.1, "kl_none": 1.0, "top1": 0.9, "nll_full": 1.0, "nll_memory": 1.1, "nll_none": 2.0, "tokens": 10.0}


def test_the_model_is_named_once(tiny):
    memory = tiny.exact()
    memory.build["model"] = "tiny.gguf"
    shown = show(tiny.save(memory, "named"))
    assert "tiny.gguf: llama, 3 layers" in shown.output and shown.output.count("model") == 1


@pytest.mark.parametrize(
    "fidelity, says",
    [
        (MEASURED, "KL to the full prefix 0.1000"),
        (MEASURED | {"kl_mean": 0.31}, "answers still deviate 31% as much as with no prefix at all"),
        (MEASURED | {"kl_none": 0.0}, "poor stand-in"),
        ({}, "was not measured"),
        (MEASURED | {"kl_mean": 0.0, "kl_none": 0.0}, "KL to the full prefix 0.0000"),
    ],
)
def test_any_fidelity_is_shown(tiny, fidelity, says):
    memory = tiny.exact()
    memory.fidelity = fidelity
    path = tiny.save(memory, "fidelity")
    assert says in " ".join(re.sub("[│\n]", " ", show(path).output).split())
    assert json.loads(show(path, "--json").output, parse_constant=pytest.fail)["fidelity"].keys() == fidelity.keys()
