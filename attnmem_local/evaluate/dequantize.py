"""An F32 copy of a GGUF, for judging exactness: with F32 weights llama.cpp quantizes no activations."""

import os

import llama_cpp
from llama_cpp._utils import suppress_stdout_stderr

from ..memory.errors import BadInput
from ..memory.files import replace_file


def write_f32(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a GGUF with every tensor dequantized to float32. Raises OSError, and BadInput for a file that is not a model."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    parameters.allow_requantize = True
    with replace_file(target) as part, suppress_stdout_stderr(disable=False):
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(part), parameters):
            raise BadInput(f"'{source}' cannot be dequantized: this llama.cpp does not know it as a model; give a GGUF model")
