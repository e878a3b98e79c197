"""What the logs of a finished run say of its speed: tokens per second of each training and, on a GPU, its MFU.

    python scripts/bench/speed.py RUN_DIR

Speed is the median over the steps of ``metrics.jsonl`` after the first 20, which warm up.  Tokens are those of the
sequences, padding included.  MFU counts 6 operations for each parameter of the blocks and token, and 6 for each of the
head and learned token, without attention, over 800 TFLOP/s.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

from doremi_mix.costs import H100, ModelShape

WARM_UP = 20


def main() -> None:
    run = Path(sys.argv[1])
    for log in sorted(run.glob("**/metrics.jsonl")):
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()][WARM_UP:]
        config = log.parent / "model" / "config.json"
        if not rows or not config.exists():
            continue
        shape = ModelShape.from_config(json.loads(config.read_text(encoding="utf-8")))
        speed = statistics.median(row["tokens_per_second"] for row in rows)
        labels = sum(row["num_tokens"] for row in rows) / sum(row["seconds"] for row in rows)
        blocks = shape.num_layers * shape.num_block_parameters
        operations = 6.0 * (blocks * speed + shape.num_head_parameters * labels)
        mfu = f", MFU {operations / H100.flops:.3f}" if torch.cuda.is_available() else ""
        print(
            f"{log.parent.relative_to(run)}: {shape.num_parameters / 1e6:.0f} M parameters, {speed:,.0f} tokens/s, of "
            f"which {labels:,.0f} are learned{mfu} ({len(rows)} steps; loss {rows[0]['loss']:.3f} to "
            f"{rows[-1]['loss']:.3f})"
        )


if __name__ == "__main__":
    main()
