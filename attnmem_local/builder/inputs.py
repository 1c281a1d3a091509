"""What a build reads and where it writes, checked before the work: a mistyped path must not cost minutes."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..memory.errors import BadInput
from ..memory.files import check_space
from ..memory.messages import parse_messages
from ..prompt.texts import read_text
from .sources import SOURCES, Query
from .sources.traces import read_traces


def check_inputs(model, prefix, queries: Sequence[Query], out: str | os.PathLike | None) -> None:
    """Raises OSError or BadInput for a file that cannot be used, or a place that cannot be written.

    The arguments are those of build_memory. Only paths among them are checked.
    """
    parts = [prefix] if isinstance(prefix, (str, os.PathLike)) else prefix if isinstance(prefix, (list, tuple)) else []
    parts = [part for part in parts if isinstance(part, (str, os.PathLike))]
    traces = [source for source in queries if isinstance(source, (str, os.PathLike)) and source not in SOURCES]
    for path in parts:
        if _is_kept(path):
            text = read_text(path)
            if not text.strip():
                raise BadInput(f"'{path}' has no text")
            if Path(path).suffix.lower() == ".json":
                parse_messages(text)
    for path in traces:
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no file of traces '{path}'; give a file, or one of {', '.join(SOURCES)}")
        if _is_kept(path):
            read_traces(path)
    if out is not None:
        check_target(out, [path for path in (model, *parts, *traces) if isinstance(path, (str, os.PathLike))])


def _is_kept(path: str | os.PathLike) -> bool:
    """Whether a file can be read twice, unlike a pipe. Raises OSError if it does not exist."""
    os.stat(path)
    return not Path(path).is_fifo()


def check_target(out: str | os.PathLike, inputs: Sequence[str | os.PathLike] = ()) -> None:
    """Raises OSError or BadInput if a memory cannot be written to a path, or would replace one of its inputs."""
    check_space(out, 0)
    for path in inputs:
        if os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
            raise BadInput(f"the memory would replace '{path}', which it is built from; choose another --out")
