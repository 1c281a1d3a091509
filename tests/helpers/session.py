"""Live tokens in PyTorch after memories instead of a prefix."""

from attnmem_local.builder.capture import Live
from attnmem_local.builder.memory_state import Converted, memory_state
from attnmem_local.builder.model import BuildModel
from attnmem_local.builder.state import merge
from attnmem_local.memory.memory import Memory


def memory_session(model: BuildModel, memories: list[Memory]) -> Live:
    """A session whose past is these memories."""
    converted: list[Converted] = [{} for _ in memories]

    def past(layer, q, scale):
        state = None
        for memory, tables in zip(memories, converted):
            other = memory_state(memory, layer, model.to_gguf_order(q), tables)
            state = other if state is None else merge(state, other)
        return state

    return Live(past)
