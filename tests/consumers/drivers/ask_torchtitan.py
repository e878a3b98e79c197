"""Asks torchtitan: its own data loader reads the files, packs the rows and mixes them."""

import importlib.util
from itertools import islice

from asked import main
from torchtitan.components.tokenizer import BaseTokenizer


class Words(BaseTokenizer):
    """A token is a word; the domain's number stands for each of its words."""

    def __init__(self):
        super().__init__()
        self.eos_id = 0

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))

    def get_vocab_size(self):
        return 1000

    def apply_chat_template(self, messages, **_):
        return " ".join(message["content"] for message in messages)


def draw(request):
    """Returns of which domain each of the first sequences is, and how many tokens it holds."""
    spec = importlib.util.spec_from_file_location("torchtitan_mixture", request["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = request["numbers"]

    def messages(row):
        user, assistant = row["messages"]
        number = str(numbers[row["domain"]])
        return [
            {"role": user["role"], "content": number},
            {"role": assistant["role"], "content": " ".join([number] * len(assistant["content"].split()))},
        ]

    module.messages = messages
    loader = module.dataloader().build(
        dp_world_size=1, dp_rank=0, tokenizer=Words(), seq_len=request["length"], local_batch_size=1
    )
    sequences, tokens = {}, {}
    for inputs, _ in islice(loader, request["number"]):
        found = [token for token in inputs["input"][0].tolist() if token]
        (number,) = set(found)
        sequences[str(number)] = sequences.get(str(number), 0) + 1
        tokens[str(number)] = tokens.get(str(number), 0) + len(found)
    return {"sequences": sequences, "tokens": tokens}


if __name__ == "__main__":
    main({"draw": draw})
