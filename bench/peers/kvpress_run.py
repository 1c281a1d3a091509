"""Presses of NVIDIA kvpress, run by presses.py with an interpreter that has them (requirements.txt).

    python kvpress_run.py JOB.json

JOB: {"gguf": path, "prefix": tokens, "chat": whether the prefix ends in an open user turn,
      "windows": [{"tokens": tokens, "n_given": how many are not scored}]}
or, to classify (the answers are the most probable labels after the tests):
     {"gguf", "prefix", "chat", "labels": [tokens], "tests": [tokens]}
Each line of standard input is a press and the share of the KV cache to keep, such as "SnapKV 0.125"; each line of standard output
is what metrics.compare gives, with "share" and "nll_full", or {"answers", "share", "ms_per_test"}, or {"error"}.
KL is to the full cache in this process.
"""

import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import kvpress
import numpy as np
import torch
import torch.nn.functional as F
import transformers

from bench.common.labels import most_probable
from bench.common.metrics import compare

PRESSES = {
    "Knorm": kvpress.KnormPress,
    "SnapKV": kvpress.SnapKVPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "KVzip": kvpress.KVzipPress,
    "AdaKV-ExpectedAttention": lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2)),
}
# in a chat, KVzip asks the model to repeat the context in the user turn that is open, and to answer
TURN = "{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n"


def attend_kept(module, query, key, value, attention_mask, scaling=None, **_):
    """Causal attention without the keys that a press of uneven budgets marks as dropped in its attention layer.

    kvpress itself looks for a fake key that no query of the call attends to; with many queries there may be none.
    """
    n_q, n = query.shape[2], key.shape[2]
    mask = torch.ones(n_q, n, dtype=torch.bool).tril(n - n_q).repeat(1, key.shape[1], 1, 1)
    if getattr(module, "masked_key_indices", None) is not None:
        _, head, position = module.masked_key_indices
        mask[0, head, :, position] = False
    groups = query.shape[1] // key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, mask.repeat_interleave(groups, 1), scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("attend_kept", attend_kept)
transformers.AttentionMaskInterface.register("attend_kept", lambda *args, **options: None)


class Runner:
    def __init__(self, job: dict):
        path = Path(job["gguf"])
        options = dict(gguf_file=path.name, dtype=torch.float32)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
        self.prefix = torch.tensor([job["prefix"]])
        self.windows = job.get("windows", [])
        self.labels = [tuple(label) for label in job.get("labels", [])]
        self.tests = job.get("tests", [])

        self.folder = tempfile.TemporaryDirectory()  # KVzip loads the tokenizer again, from the folder of the model
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.chat_template = TURN if job["chat"] else None
        tokenizer.save_pretrained(self.folder.name)
        self.model.config.name_or_path = self.folder.name

        self.layers = []  # what a press sees of each layer: attention module, arguments, output
        self.cache = transformers.DynamicCache()
        self.prefill()
        self.full = self.log_probs(self.cache)

    def prefill(self) -> None:
        """Run the prefix once, for all presses."""
        hooks = []
        for layer in self.model.model.layers:
            layer.self_attn.rotary_emb = self.model.model.rotary_emb
            hook = lambda module, args, options, output: self.layers.append((module, options, output))  # noqa: E731
            hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        self.model.model(input_ids=self.prefix, past_key_values=self.cache)
        for hook in hooks:
            hook.remove()

    def compress(self, press) -> transformers.DynamicCache:
        """The KV cache of the prefix after a press, rounded to float16."""
        for module, *_ in self.layers:
            module.masked_key_indices = None
        if isinstance(press, kvpress.KVzipPress):  # it runs the model itself
            self.model.set_attn_implementation("sdpa")
            cache = transformers.DynamicCache()
            with press(self.model):
                self.model.model(input_ids=self.prefix, past_key_values=cache)
        else:  # as `with press(model)` would do during prefill
            cache = copy.deepcopy(self.cache)
            press.post_init_from_model(self.model)
            for module, options, output in self.layers:
                press.forward_hook(module, [], options | {"past_key_values": cache}, output)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.half().float(), layer.values.half().float()
        return cache

    def kept(self, cache) -> float:
        """Share of keys that a compressed cache still has."""
        n = 0
        for layer, module in zip(cache.layers, self.model.model.layers):
            masked = module.self_attn.masked_key_indices
            n += layer.keys.shape[1] * layer.keys.shape[2] - (0 if masked is None else len(masked[0]))
        return n / (self.prefix.shape[1] * self.model.config.num_key_value_heads * len(cache.layers))

    def log_probs(self, cache) -> list[np.ndarray]:
        """Of each window float32 [n_scored, n_vocab]; its positions follow the whole prefix."""
        self.model.set_attn_implementation("attend_kept")
        rows = []
        for window in self.windows:
            tokens = torch.tensor([window["tokens"]])
            positions = self.prefix.shape[1] + torch.arange(tokens.shape[1])[None]
            logits = self.model(input_ids=tokens, position_ids=positions, past_key_values=copy.deepcopy(cache)).logits[0]
            rows.append(logits[max(window["n_given"] - 1, 0) :].log_softmax(-1).numpy())
        return rows

    def classify(self, cache) -> list[int]:
        """The most probable label after each test."""
        self.model.set_attn_implementation("attend_kept")
        n = cache.get_seq_length()

        def log_probs(tokens, n_past: int, last: bool):
            cache.crop(n + n_past)
            positions = self.prefix.shape[1] + n_past + torch.arange(len(tokens))[None]
            logits = self.model(
                input_ids=torch.tensor([tokens]), position_ids=positions, past_key_values=cache, logits_to_keep=int(last)
            ).logits[0]
            return logits.double().log_softmax(-1).numpy()

        return [most_probable(self.labels, test, log_probs) for test in self.tests]

    def run(self, name: str, share: float) -> dict:
        cache = self.compress(PRESSES[name](1 - share))
        share = self.kept(cache)  # before live tokens are added
        if self.tests:
            start = time.perf_counter()
            answers = self.classify(cache)
            return {"answers": answers, "share": share, "ms_per_test": 1000 * (time.perf_counter() - start) / len(self.tests)}
        texts = [window["tokens"][max(window["n_given"] - 1, 0) :] for window in self.windows]
        result = compare(self.full, self.log_probs(cache), texts)
        if not np.isfinite(result["kl"]):
            raise ValueError("the KL is not finite")
        return result | {"share": share, "nll_full": compare(self.full, self.full, texts)["nll"]}


@torch.inference_mode()
def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    runner = Runner(json.loads(Path(sys.argv[1]).read_text()))
    for line in sys.stdin:
        name, share = line.split()
        try:
            result = runner.run(name, float(share))
        except Exception as error:  # a row of the table, not the end of the run
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
