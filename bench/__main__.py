"""python -m bench quality|tasks|speed|gpu; see README.md."""

from importlib import import_module

import click

COMMANDS = {
    "quality": {
        "exact": "bench.quality.exact",
        "fidelity": "bench.quality.fidelity",
        "sources": "bench.quality.sources",
        "update": "bench.quality.update",
        "lookup-entries": "bench.quality.lookup_entries",
    },
    "tasks": "bench.tasks.banking77",
    "speed": {
        "decode": "bench.speed.decode",
        "attention": "bench.speed.attention",
        "search": "bench.speed.search",
        "build-time": "bench.speed.build_time",
    },
    "gpu": {name: f"bench.gpu.{name}" for name in ("build", "check", "attention", "decode", "builder", "table", "record")},
}


class Commands(click.Group):
    """Modules with a command `main` each, imported when called: the GPU stages choose a libllama before it is loaded."""

    def __init__(self, name: str, modules: dict):
        super().__init__(name)
        self.modules = modules

    def list_commands(self, context) -> list[str]:
        return list(self.modules)

    def get_command(self, context, name: str) -> click.Command | None:
        module = self.modules.get(name)
        if isinstance(module, dict):
            return Commands(name, module)
        return module and import_module(module).main


main = Commands("bench", COMMANDS)

if __name__ == "__main__":
    main(prog_name="python -m bench")
