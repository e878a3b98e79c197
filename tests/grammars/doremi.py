"""How the official DoReMi code reads its domain weights: doremi/train.py and doremi/dataloader.py.

https://github.com/sangmichaelxie/doremi
"""

import json


def read(files, sizes):
    (text,) = files.values()
    config = json.loads(text, object_pairs_hook=unique)
    train, evaluation = config["train_domain_weights"], config["eval_domain_weights"]
    assert set(train) == set(evaluation)
    names = sorted(train)
    for name in names:
        # preprocessed_dir / name must be a folder below preprocessed_dir.
        assert name not in ("", ".", "..")
        assert "/" not in name
    weights = [train[name] for name in names]
    assert all(isinstance(weight, float) and weight > 0 for weight in weights)
    total = sum(weights)
    return {name: weight / total for name, weight in zip(names, weights, strict=True)}


def unique(pairs):
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


READERS = {"doremi": read}
