"""Writing a Memory as a GGUF in the format of docs/memory-format.md."""

import io
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from .entries import KINDS
from .format import ADAPTER_TYPE, FORMAT_VERSION, MODEL_KEYS
from .gguf_file import ALIGNMENT
from .tables import Q8_0

if TYPE_CHECKING:
    from .memory import Memory


def write_memory(memory: "Memory", out: BinaryIO) -> None:
    """Write a memory to a file or to a buffer in RAM. Raises OSError."""
    header = _header(memory)
    out.write(header)
    out.write(bytes(-len(header) % ALIGNMENT))
    for _, array in tensors(memory):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        out.write(data.data)
        out.write(bytes(-len(data) % ALIGNMENT))


def _header(memory: "Memory") -> bytes:
    """The GGUF header: all keys, and the name, type, shape and offset of each tensor."""
    writer = gguf.GGUFWriter(None, memory.model.architecture)
    add: dict[type, Callable] = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    writer.add_custom_alignment(ALIGNMENT)
    writer.add_type("adapter")
    writer.add_string("adapter.type", ADAPTER_TYPE)
    writer.add_uint32("attnmem.version", FORMAT_VERSION)
    for name, key in MODEL_KEYS.items():
        if name != "architecture":  # GGUFWriter has written it
            value = getattr(memory.model, name)
            add[type(value)](key, value)
    writer.add_array("attnmem.prefix.tokens", [int(t) for t in memory.prefix_tokens])
    # add_string would leave out an empty text
    writer.add_key_value("attnmem.prefix.text", memory.prefix_text, gguf.GGUFValueType.STRING)
    if memory.prefix_messages is not None:
        writer.add_string("attnmem.prefix.messages", json.dumps(memory.prefix_messages, ensure_ascii=False))
    if memory.prefix_tools is not None:
        writer.add_string("attnmem.prefix.tools", json.dumps(memory.prefix_tools, ensure_ascii=False))
    if memory.prefix_date is not None:
        writer.add_string("attnmem.prefix.date", memory.prefix_date)
    writer.add_uint32("attnmem.segment.count", len(memory.layers))
    writer.add_array("attnmem.segment.offset", [int(i) for i in memory.segment_offset])
    if memory.token_top_k is not None:
        writer.add_uint32("attnmem.token.top_k", memory.token_top_k)
    is_measured = np.isfinite(list(memory.fidelity.values())).all()  # a single token of live text has no NLL, so NaN
    for group, values in (("build", memory.build), ("fidelity", memory.fidelity if is_measured else {})):
        for name, value in values.items():
            add[type(value)](f"attnmem.{group}.{name}", value)
    for name, array in tensors(memory):
        is_q8_0 = array.dtype == np.uint8
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=Q8_0 if is_q8_0 else None)
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY  # type: ignore[list-item]  # open_output_file takes files on disk only
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue()


def tensors(memory: "Memory") -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of all tensors, in file order."""
    for s, layers in enumerate(memory.layers):
        for il, layer in sorted(layers.items()):
            for kind in KINDS:
                if (entries := getattr(layer, kind.name)) is None:
                    continue
                parts = {part: getattr(entries, part) for part in ("key", "bias", "value", "lse")}
                parts["head"] = np.zeros((2 if entries.lists is None else 3, len(entries.offset)), dtype=entries.offset.dtype)
                parts["head"][0] = entries.offset
                if (lists := entries.lists) is not None:
                    parts["head"][2] = lists.head
                    parts |= {"list_key": lists.key, "list_bias": lists.bias, "list": lists.offset}
                if (graph := entries.graph) is not None:
                    parts["head"][1, :-1] = graph.entry
                    parts |= {"link0": graph.link0, "link": graph.link, "upper": graph.upper}
                for part, array in parts.items():
                    if array is not None:
                        yield f"seg.{s}.blk.{il}.{kind.name}.{part}", array
