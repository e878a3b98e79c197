"""Writes what scripts/bettermixture.sh --tiny runs on: a small random Baichuan2, a proxy's config, benchmark items.

Usage: python scripts/tiny_bettermixture.py TOKENIZER_FOLDER OUT
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from local_tasks import write_local_tasks
from tiny_baichuan import write_tiny_baichuan

from doremi_mix.tokenizer import load_tokenizer

SIZE = 32
"""Hidden size: with 125,696 tokens in the vocabulary, the head is what a small model computes."""


def main():
    tokenizer, out = Path(sys.argv[1]), Path(sys.argv[2])
    vocab_size = load_tokenizer(str(tokenizer)).vocab_size
    write_tiny_baichuan(
        out / "baichuan2", vocab_size=vocab_size, hidden_size=SIZE, intermediate_size=88, tokenizer=tokenizer
    )
    proxy = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": SIZE,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    (out / "proxy").mkdir(exist_ok=True)
    (out / "proxy" / "config.json").write_text(json.dumps(proxy, indent=2) + "\n", encoding="utf-8")
    write_local_tasks(out / "tasks")


if __name__ == "__main__":
    main()
