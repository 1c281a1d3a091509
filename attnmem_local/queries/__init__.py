"""Query sources, one file each: what the live text after a prefix may look like.

A source is a function from (model, prefix, kv, options) to windows, token sequences that each follow the prefix.
"""

from .repeat_prefill import repeat_prefill
from .self_study import self_study
from .traces import read_traces, traces

__all__ = ["read_traces", "repeat_prefill", "self_study", "traces"]
