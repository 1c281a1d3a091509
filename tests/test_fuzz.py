"""A short run of the fuzzer; docs/fuzzing.md says how to make a long one."""

import pytest
from fuzz.bases import base_memories
from fuzz.run import fuzz


@pytest.mark.slow
def test_no_damaged_file_crashes_hangs_or_is_taken_by_one_reader_only(tiny, tiny32, tmp_path):
    report = fuzz(base_memories(tiny, tiny32), tmp_path, files=250)
    assert report.failures == []
    assert {("python", "accepted"), ("python", "invalid"), ("native", "truncated"), ("decode", "decoded")} <= report.outcomes.keys()
