"""TRL's preparation of the same rows, in a Python that has it: `benchmarks/data.py --trl PYTHON` runs this.

    PYTHON benchmarks/data_theirs.py ROWS.jsonl TOKENIZER MAX_LENGTH KIND PROCESSES

Rendering, masking, tokenising and packing, as `SFTTrainer` does them when it is made. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version


def main() -> None:
    rows, tokenizer_path, max_length, kind, processes = sys.argv[1:]
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with open(rows) as file:
        raw = [json.loads(line) for line in file]
    if kind == "text":
        dataset = Dataset.from_list([{"text": r["text"]} for r in raw])
    else:
        dataset = Dataset.from_list([
            {"prompt": [{"role": "user", "content": r["prompt"]}],
             "completion": [{"role": "assistant", "content": r["response"]}]}
            for r in raw
        ])  # fmt: skip
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out, packing=True, max_length=int(max_length), report_to=[], use_cpu=True, bf16=False,
            dataset_num_proc=int(processes) or None, eos_token=tokenizer.eos_token,
        )  # fmt: skip
        began = time.perf_counter()
        trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
        seconds = time.perf_counter() - began
    packed = trainer.train_dataset
    tokens = sum(len(ids) for ids in packed["input_ids"])
    print(json.dumps({
        "seconds": seconds, "rows": len(raw), "tokens": tokens, "packs": len(packed),
        "fill": tokens / (len(packed) * int(max_length)), "processes": int(processes),
        "versions": {name: version(name) for name in ("trl", "transformers", "datasets", "tokenizers")},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
