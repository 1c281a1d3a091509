"""Parsing an untrusted memory file: every field is checked before it is used. The native loader in native/src is its twin."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .entries import KINDS, Entries, Graph, Kind, LayerMemory, Lists
from .errors import BadInput, Invalid, NotAMemory, WrongVersion
from .format import (
    ADAPTER_TYPE,
    BLOCK_NAME,
    FIDELITY,
    FORMAT_VERSION,
    MAX_ABS,
    MAX_BLOCKS,
    MAX_HEADS,
    MAX_KIND_TENSORS,
    MAX_KV_HEADS,
    MAX_SEGMENTS,
    MAX_TOP_K,
    MODEL_KEYS,
    TYPES,
)
from .gguf_file import ALIGNMENT, GGUFFile, Value
from .messages import parse_date, parse_messages, parse_tools
from .spec import ModelSpec
from .tables import block_scales


def parse_memory(content: np.ndarray) -> dict[str, Any]:
    """The fields of the Memory in a file, by name. Raises a MemoryRefused that says what is wrong.

    content: uint8 [n], see read_content.
    """
    return _Parser(content).memory()


class _Parser:
    def __init__(self, content: np.ndarray):
        self.file = GGUFFile(content)
        self.file.read_keys()
        self.n_used = 0  # tensors that the memory uses

    def value(self, key: str, kind: type) -> Any:
        """The value of a required key; kind is str, int, float (which must be finite) or list (of int)."""
        if (stored := self.file.keys.get(key)) is None:
            raise Invalid(f"the key '{key}' is missing")
        if stored.type != TYPES[kind]:
            raise Invalid(f"the key '{key}' has type {stored.type}, expected {TYPES[kind]}")
        value: Any = stored.value
        if kind is float and not np.isfinite(value):
            raise Invalid(f"the key '{key}' is not a finite number")
        return value.tolist() if kind is list else value

    def group(self, prefix: str, kinds: tuple[type, ...], but: str | None = None) -> dict:
        """All values whose keys begin with prefix, each of one of the kinds; but: the one name to leave out."""
        of_type = {TYPES[kind]: kind for kind in kinds}
        return {
            key[len(prefix) :]: self.value(key, of_type.get(stored.type, kinds[0]))
            for key, stored in self.file.keys.items()
            if key.startswith(prefix) and key != f"{prefix}{but}"
        }

    def tensor(self, name: str, types: tuple[str, ...], shape: tuple) -> np.ndarray:
        """A required tensor of one or two dimensions; None in shape accepts any size."""
        if (tensor := self.tensors.get(name)) is None:
            raise Invalid(f"the tensor '{name}' is missing")
        if tensor.type not in types:
            raise Invalid(f"the tensor '{name}' has type {tensor.type}, expected {' or '.join(types)}")
        expected = (1,) * (4 - len(shape)) + shape
        if any(size is not None and actual != size for actual, size in zip(tensor.shape, expected)):
            raise Invalid(f"the tensor '{name}' has shape {tensor.shape}, expected {expected}")
        array = tensor.data if len(shape) == 2 else tensor.data[0]
        if tensor.type == "q8_0":
            bounded = np.isfinite(block_scales(array))  # at most 127 x 65504, far below MAX_ABS
        elif tensor.type == "i32":
            bounded = np.True_  # offsets and ids are checked where they are used
        else:
            bounded = (np.abs(array) <= MAX_ABS) | (name.endswith(".centroid.lse") & (array == -np.inf))
        if not bounded.all():
            raise Invalid(f"the tensor '{name}' has a value that is not finite or too large")
        self.n_used += 1
        return array

    def table(self, name: str, n: int | None, d: int) -> np.ndarray:
        """A required table of keys or values, [n, d]."""
        return self.tensor(name, ("f16", "f32", "q8_0"), (n, d))

    def memory(self) -> dict[str, Any]:
        self.check_header()
        spec = self.spec()
        prefix = self.prefix()
        segment_offset = self.segment_offset(spec, len(prefix["prefix_tokens"]))
        fidelity = self.group("attnmem.fidelity.", (float,))
        if fidelity and (missing := set(FIDELITY) - fidelity.keys()):
            raise Invalid(f"the key 'attnmem.fidelity.{min(missing)}' is missing")
        top_k = self.top_k()
        build = self.group("attnmem.build.", (str, int, float))
        layers = self.layers(spec, n_segments=len(segment_offset) - 1)
        if top_k is None and any(layer.token for segment in layers for layer in segment.values()):
            raise Invalid("the key 'attnmem.token.top_k' is missing")
        return dict(
            model=spec, **prefix, segment_offset=segment_offset, token_top_k=top_k, build=build, fidelity=fidelity, layers=layers
        )

    def check_header(self) -> None:
        """Raises NotAMemory, WrongVersion or Invalid for a GGUF that this build cannot read as a memory."""
        types = [self.file.keys.get(key) for key in ("general.type", "adapter.type")]
        if types != [Value("str", "adapter"), Value("str", ADAPTER_TYPE)]:
            raise NotAMemory("the GGUF file is not an attention-state memory")
        if (version := self.value("attnmem.version", int)) != FORMAT_VERSION:
            raise WrongVersion(
                f"the memory has format version {version}, this build reads version {FORMAT_VERSION}; build it again"
            )
        if (alignment := self.value("general.alignment", int)) != ALIGNMENT:
            raise Invalid(f"the tensors are aligned to {alignment} bytes, expected {ALIGNMENT}")

    def prefix(self) -> dict[str, Any]:
        """The fields of the Memory that describe its prefix."""
        tokens = self.value("attnmem.prefix.tokens", list)
        if min(tokens, default=0) < 0:
            raise Invalid(f"the prefix has token {min(tokens)}, expected none below 0")
        strings = self.group("attnmem.prefix.", (str,), but="tokens")
        return dict(
            prefix_tokens=tokens,
            prefix_text=self.value("attnmem.prefix.text", str),
            prefix_messages=_parsed(strings, "messages", parse_messages),
            prefix_tools=_parsed(strings, "tools", parse_tools),
            prefix_date=_parsed(strings, "date", parse_date),
        )

    def segment_offset(self, spec: ModelSpec, n_tokens: int) -> list[int]:
        n_segments = self.value("attnmem.segment.count", int)
        offset = self.value("attnmem.segment.offset", list)
        if not 1 <= n_segments <= MAX_SEGMENTS or len(offset) != n_segments + 1:
            raise Invalid(f"{n_segments} segments with {len(offset)} offsets, expected 1 to {MAX_SEGMENTS} and one offset more")
        _check_offsets("attnmem.segment.offset", np.array(offset), n_tokens)
        if (n_heads := n_segments * spec.block_count * spec.head_count_kv) > MAX_KV_HEADS:
            raise Invalid(f"{n_heads} KV heads in all segments, expected at most {MAX_KV_HEADS}")
        return offset

    def layers(self, spec: ModelSpec, n_segments: int) -> list[dict[int, LayerMemory]]:
        """The tables, as [segment][layer]. Raises Invalid if the file has a tensor that belongs to none."""
        self.tensors = self.file.read_tensors(len(KINDS) * MAX_KIND_TENSORS * n_segments * spec.block_count)
        layers: list[dict[int, LayerMemory]] = [{} for _ in range(n_segments)]
        for s, il in sorted({tuple(map(int, m.groups())) for name in self.tensors if (m := BLOCK_NAME.match(name))}):
            if s < n_segments and il < spec.block_count and (layer := self.layer(f"seg.{s}.blk.{il}.", spec)):
                layers[s][il] = layer
        if self.n_used != len(self.tensors):
            raise Invalid(
                f"the memory has {len(self.tensors)} tensors, of which this build knows only {self.n_used}; "
                "use a newer build, or build the memory again"
            )
        return layers

    def spec(self) -> ModelSpec:
        spec = ModelSpec(**{name: self.value(key, ModelSpec.__annotations__[name]) for name, key in MODEL_KEYS.items()})
        for name, limit in (("block_count", MAX_BLOCKS), ("head_count", MAX_HEADS), ("head_count_kv", MAX_HEADS)):
            if not 1 <= (n := getattr(spec, name)) <= limit:
                raise Invalid(f"the key '{MODEL_KEYS[name]}' is {n}, expected 1 to {limit}")
        if spec.head_count % spec.head_count_kv:
            raise Invalid(f"{spec.head_count} heads cannot share {spec.head_count_kv} KV heads")
        for name in ("scale", "rope_freq_base", "rope_freq_scale"):
            if not 0 < (x := getattr(spec, name)) <= MAX_ABS:
                raise Invalid(f"the key '{MODEL_KEYS[name]}' is {x:g}, expected more than 0 and at most {MAX_ABS:g}")
        return spec

    def top_k(self) -> int | None:
        if "attnmem.token.top_k" not in self.file.keys:
            return None
        if not 1 <= (top_k := self.value("attnmem.token.top_k", int)) <= MAX_TOP_K:
            raise Invalid(f"the key 'attnmem.token.top_k' is {top_k}, expected 1 to {MAX_TOP_K}")
        return top_k

    def layer(self, prefix: str, spec: ModelSpec) -> LayerMemory | None:
        entries = {kind.name: self.entries(f"{prefix}{kind.name}.", spec, kind) for kind in KINDS}
        layer = LayerMemory(**entries)
        if layer.residual is not None:
            n_anchors = np.diff(layer.anchor.offset) if layer.anchor is not None else np.zeros(spec.head_count_kv)
            if ((np.diff(layer.residual.offset) > 0) & (n_anchors == 0)).any():
                raise Invalid(f"'{prefix}residual' has entries for a head that has no anchors to correct")
        return layer if any(table is not None for table in entries.values()) else None

    def entries(self, prefix: str, spec: ModelSpec, kind: Kind) -> Entries | None:
        if prefix + "key" not in self.tensors:
            return None
        key = self.table(prefix + "key", None, spec.key_length)
        n = len(key)
        has_lists = kind.is_searched and prefix + "list" in self.tensors
        offset, entry, *lists = self.tensor(prefix + "head", ("i32",), (3 if has_lists else 2, spec.head_count_kv + 1))
        entries = Entries(
            key=key,
            bias=self.tensor(prefix + "bias", ("f32",), (n,)),
            value=self.table(prefix + "value", n, spec.value_length),
            lse=self.tensor(prefix + "lse", ("f32",), (n,)) if kind.has_lse else None,
            offset=offset,
        )
        _check_offsets(prefix + "head", offset, n)
        if kind.is_searched and prefix + "link0" in self.tensors:
            entries.graph = self.graph(prefix, entries, entry[:-1])
        if has_lists:
            entries.lists = self.lists(prefix, spec, entries, *lists)
        return entries

    def lists(self, prefix: str, spec: ModelSpec, entries: Entries, head: np.ndarray) -> Lists:
        key = self.table(prefix + "list_key", None, spec.key_length)
        n = len(key)
        bias = self.tensor(prefix + "list_bias", ("f32",), (n,))
        offset = self.tensor(prefix + "list", ("i32",), (n + 1,))
        _check_offsets(prefix + "list", offset, len(entries.key))
        _check_offsets(prefix + "head", head, n)
        if (offset[1:] == offset[:-1]).any() or (offset[head] != entries.offset).any():
            raise Invalid(f"a list in '{prefix}list' is empty, or reaches into another head")
        return Lists(key, bias, offset, head)

    def graph(self, prefix: str, entries: Entries, entry: np.ndarray) -> Graph:
        integer = ("i32",)
        n = len(entries.key)
        graph = Graph(
            link0=self.tensor(prefix + "link0", integer, (n, None)),
            link=self.tensor(prefix + "link", integer, (None, None)),
            upper=self.tensor(prefix + "upper", integer, (n + 1,)),
            entry=entry,
        )
        _check_offsets(prefix + "upper", graph.upper, min(max(int(graph.upper[-1]), 0), len(graph.link)))
        for h in range(len(graph.entry)):
            if not _links_stay(graph, entries.head(h), graph.entry[h]):
                raise Invalid(f"a link of the graph '{prefix}link0' points outside of head {h}, or to a level its target lacks")
        return graph


def _links_stay(graph: Graph, head: slice, entry: int) -> bool:
    """Whether the entry point and all links of one head point to entries of the head that exist on the level of the link."""
    n = head.stop - head.start
    link0 = graph.link0[head]
    n_upper_levels = np.diff(graph.upper[head.start : head.stop + 1])  # of each entry
    rows = np.arange(graph.upper[head.start], graph.upper[head.stop])
    links = graph.link[rows]
    level = rows - np.repeat(graph.upper[head], n_upper_levels)  # of each row of links, 0 for level 1
    return (
        (n == 0 or 0 <= entry < n)
        and bool(((link0 >= -1) & (link0 < n)).all())
        and bool(((links >= -1) & (links < n)).all())
        and bool((n_upper_levels[np.maximum(links, 0)] > level[:, None])[links >= 0].all())
    )


def _parsed(strings: dict[str, str], name: str, parse: Callable[[str], Any]) -> Any:
    """The parsed text of an optional key, None if the key is absent."""
    if name not in strings:
        return None
    try:
        return parse(strings[name])
    except BadInput as error:
        raise Invalid(f"the key 'attnmem.prefix.{name}': {error}") from None


def _check_offsets(name: str, offset: np.ndarray, n: int) -> None:
    """Raises Invalid unless the offsets ascend from 0 to n."""
    if offset[0] != 0 or offset[-1] != n or (offset[1:] < offset[:-1]).any():
        raise Invalid(f"the offsets in '{name}' do not ascend from 0 to {n}")
