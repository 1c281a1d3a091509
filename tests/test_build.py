"""The builder: where models, prefixes and queries come from."""

import copy
import json
import math

import pytest
import torch
import transformers

from attnmem_local.builder.build import HELD_OUT, build_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.job import Build
from attnmem_local.builder.model import load_model
from attnmem_local.builder.progress import Progress
from attnmem_local.builder.sources.repeat_prefill import repeat_prefill
from attnmem_local.builder.sources.self_study import self_study, study_shape
from attnmem_local.builder.sources.traces import read_traces, traces
from attnmem_local.memory import errors
from attnmem_local.memory.memory import Memory
from attnmem_local.prompt.live import live_chat, with_prefix_messages
from attnmem_local.prompt.prefix import chat_prefix
from attnmem_local.runtime.llama import MemoryLlama

SYSTEM = [{"role": "system", "content": "You sell tea. Green tea is 4 euros, black tea is 3."}]


def test_a_transformers_directory_gives_the_same_memory_as_its_gguf(tiny, tmp_path):
    module = tiny.model.module
    config = copy.deepcopy(module.config)
    del config.quantization_config  # "gguf", which transformers does not save
    plain = type(module)(config)
    plain.load_state_dict(module.state_dict())
    plain.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny.folder, gguf_file=tiny.path.name).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.spec == tiny.model.spec
    assert all(torch.equal(a, b) for a, b in zip(prefill(model, tiny.prefix.tokens).k, tiny.kv.k))


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(errors.Unsupported, match="'gpt2'"):
        load_model(tmp_path)


def test_chunks_do_not_change_the_prefix(tiny):
    chunked = prefill(tiny.model, tiny.prefix.tokens, chunk=17)
    for a, b in zip(chunked.k + chunked.v, tiny.kv.k + tiny.kv.v):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_build_from_chat_messages(tiny, tmp_path):
    out = tmp_path / "chat.mem.gguf"
    built = build_memory(tiny.model, SYSTEM, out, share=0.5, windows=8)
    memory = Memory.load(out)
    assert memory.prefix_messages == SYSTEM and memory.prefix_tokens == built.prefix_tokens
    assert memory.build["queries"] == "repeat, self-study" and memory.build["model"] == tiny.path.name
    assert memory.nbytes() < 0.55 * memory.kv_bytes()
    assert memory.fidelity["kl_mean"] < memory.fidelity["kl_none"]
    answer = MemoryLlama(str(tiny.path), memory=out, verbose=False).create_chat_completion(
        [{"role": "user", "content": "Hi"}], max_tokens=2
    )
    assert answer["choices"]


def test_no_queries(tiny, tmp_path):
    with pytest.raises(ValueError, match="no queries"):
        build_memory(tiny.model, SYSTEM, tmp_path / "x.gguf", queries=[[]])
    assert list(tmp_path.iterdir()) == []


class Told(Progress):
    """Remembers in which order stages began and the estimate was told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.order = []

    def stage(self, name, total=None):
        self.order.append(name)
        return super().stage(name, total)

    def expect(self, n_written, seconds):
        self.order.append(n_written)
        super().expect(n_written, seconds)


@pytest.mark.slow
def test_a_build_says_what_it_will_take_before_the_work_begins(tiny):
    told = Told()
    build_memory(tiny.model, SYSTEM, share=0.5, progress=told)
    assert told.order[:4] == ["load model", "estimate", math.prod(study_shape(1)), "prefill"]
    work = sum(told.seconds.values()) - told.seconds["load model"] - told.seconds["estimate"]
    assert work / 8 < told.expected < 8 * work  # wide, as anything may run beside a test; bench/speed/build_time.py measures it

    told = Told()
    build_memory(tiny.model, SYSTEM, share=0.5, queries=["repeat"], progress=told)
    assert told.order[2] == 0  # nothing is written


def test_the_estimate_on_the_terminal(capsys):
    Progress().expect(1536, 38.4)
    Progress().expect(4608, 170)
    told = " ".join(capsys.readouterr().err.split())
    assert "writing 1,536 tokens of self-study, about 38 s on this machine" in told
    assert "writing 4,608 tokens of self-study, about 3 min on this machine" in told


def test_self_study_grows_with_the_prefix():
    shapes = [study_shape(n) for n in (1, 411, 1000, 1643, 2256, 100_000)]
    assert shapes == sorted(shapes) and math.prod(shapes[1]) < math.prod(shapes[4]) / 2 and shapes[4] == (24, 192)
    assert all(windows > 3 * HELD_OUT // 2 for windows, _ in shapes)  # two are left to measure on


def test_a_size_that_is_too_small_is_told_before_the_work(tiny, tmp_path):
    progress = Progress(quiet=True)
    with pytest.raises(ValueError, match="1 bytes are too few .* the least is"):
        build_memory(tiny.model, SYSTEM, tmp_path / "x.gguf", nbytes=1, progress=progress)
    assert set(progress.seconds) <= {"load model"}


def test_a_build_without_a_window_of_self_study_is_refused(tiny):
    with pytest.raises(ValueError, match="at least one window"):
        build_memory(tiny.model, SYSTEM, windows=0)


def test_self_study_is_live_text_about_the_prefix(tiny):
    prefix = chat_prefix(tiny.model.tokenizer, SYSTEM)
    kv = prefill(tiny.model, prefix.tokens)
    build = Build(tiny.model, prefix, seed=3, kv=kv)
    windows = self_study(build, n_windows=9, window=48)
    assert [len(w) for w in windows] == [48] * 9
    assert windows == self_study(build, n_windows=9, window=48)
    assert tiny.model.tokenizer.decode(windows[0]).startswith("user\nSummarize")


def test_repeat_prefill_covers_the_prefix(tiny):
    windows = repeat_prefill(tiny.prefix, 100)
    assert sum(windows, []) == tiny.prefix.tokens and max(map(len, windows)) == 100


def test_traces(tiny, tmp_path):
    path = tmp_path / "t.jsonl"
    chat = [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "4 euros"}]
    path.write_text(json.dumps({"text": "Green tea"}) + "\n\n" + json.dumps({"messages": chat}))
    prefix = chat_prefix(tiny.model.tokenizer, SYSTEM)
    text, rendered = traces(tiny.model.tokenizer, prefix, read_traces(path), window=1000)
    assert tiny.model.tokenizer.decode(text) == "Green tea"
    assert prefix.tokens + rendered == tiny.model.tokenizer.render([*SYSTEM, *chat], False)


def test_prefix_of_a_chat(tiny):
    tokenizer = tiny.model.tokenizer
    prefix = chat_prefix(tokenizer, SYSTEM)
    for content in ("Hi", "9 to 5?", "\n", "<|im_end|>"):
        message = {"role": "user", "content": content}
        assert prefix.tokens + live_chat(tokenizer, prefix, [message]) == tokenizer.render([*SYSTEM, message], True)
    with pytest.raises(errors.PrefixMismatch, match="another one"):
        with_prefix_messages([{"role": "system", "content": "x"}], SYSTEM)
