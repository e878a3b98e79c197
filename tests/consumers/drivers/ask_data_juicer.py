"""Tasks for Data-Juicer: read a configuration with its own parser, and run it."""

import json
from collections import Counter
from pathlib import Path

from asked import main
from data_juicer.config import init_configs
from data_juicer.core.data.dataset_builder import DatasetBuilder
from data_juicer.core.executor import DefaultExecutor


def configuration(request):
    arguments = ["--config", request["file"], "--text_keys", "output", "--np", "1"]
    return init_configs([*arguments, *request.get("arguments", [])])


def sample_numbers(request):
    """What its builder makes of the weights."""
    return DatasetBuilder(configuration(request)).sample_numbers


def load(request):
    """The rows that its builder loads, by domain."""
    dataset = DatasetBuilder(configuration(request)).load_dataset()
    rows = Counter((row["domain"], row["instruction"]) for row in dataset)
    most = {}
    for (domain, _), times in rows.items():
        most[domain] = max(most.get(domain, 0), times)
    return {"drawn": Counter(row["domain"] for row in dataset), "most_often": most}


def load_with_ray(request):
    """The same with the executor on Ray: rows of the one dataset that it takes."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    return DatasetBuilder(configuration(request), executor_type="ray").load_dataset().count()


def process(request):
    """What dj-process writes, by domain."""
    config = configuration(request)
    DefaultExecutor(config).run()
    lines = Path(config.export_path).read_text(encoding="utf-8").splitlines()
    return Counter(json.loads(line)["domain"] for line in lines)


if __name__ == "__main__":
    main({"sample_numbers": sample_numbers, "load": load, "load_with_ray": load_with_ray, "process": process})
