"""Without a memory the patched build computes what stock llama.cpp computes, bit for bit.

build.sh compiles libllama from the unpatched sdist too; the same script runs on either library.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.paths import ROOT

STOCK = ROOT / "build/stock/bin"

SCRIPT = """
import sys, numpy as np
from llama_cpp import Llama
rows = []
for options in ({}, {"flash_attn": True}, {"type_k": 8, "flash_attn": True}):
    llama = Llama(sys.argv[1], n_ctx=512, n_threads=2, logits_all=True, verbose=False, **options)
    tokens = llama.tokenize(b"The quick brown fox jumps over the lazy dog. " * 8)
    llama.eval(tokens)         # a batch
    for token in tokens[:8]:   # and one by one
        llama.eval([token])
    rows.append(llama._scores.copy())
np.save(sys.argv[2], np.stack(rows))
"""


def logits(model, out, **environment):
    subprocess.run([sys.executable, "-c", SCRIPT, str(model), str(out)], env=os.environ | environment, check=True)
    return np.load(out)


@pytest.mark.slow
def test_bit_identical(default_model, tmp_path):
    if not STOCK.exists():
        pytest.skip("no stock build to compare with; ./build.sh test makes it")
    patched = logits(default_model, tmp_path / "patched.npy")
    stock = logits(default_model, tmp_path / "stock.npy", LLAMA_CPP_LIB_PATH=str(STOCK))
    assert np.abs(patched).max() > 1
    assert np.array_equal(patched, stock)
