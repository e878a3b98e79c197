"""Tasks for Ray Data: import what we exported, and draw from it."""

import importlib.util
import os
from collections import Counter

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from asked import main
from ray.data import MixStoppingCondition


def start():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False


def count(dataset):
    """Counts domains, how often the most frequent row of each comes, and the longest run of one domain."""
    domains, rows, most, longest, run, last = Counter(), Counter(), {}, 0, 0, None
    for row in dataset.take_all():
        domains[row["domain"]] += 1
        rows[row["domain"], row["instruction"]] += 1
        run = run + 1 if row["domain"] == last else 1
        longest, last = max(longest, run), row["domain"]
    for (domain, _), times in rows.items():
        most[domain] = max(most.get(domain, 0), times)
    return {"drawn": domains, "most_often": most, "longest_run": longest, "columns": dataset.columns()}


def mixture(request):
    """Imports the exported files one after another and draws from each."""
    start()
    answers = []
    for file in request["files"]:
        spec = importlib.util.spec_from_file_location("exported", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        answers.append(count(module.build_dataset(**request.get("settings", {}))))
    return answers


def naive(request):
    """Draws from a mix made by hand, under each stopping condition."""
    start()
    answers = {}
    for condition in MixStoppingCondition:
        first, *others = [ray.data.read_json(path) for path in request["paths"]]
        mixed = first.mix(*others, weights=request["weights"], stopping_condition=condition)
        answers[condition.name] = count(mixed)["drawn"]
    return answers


def read(request):
    """The columns that a plain read_json gives."""
    start()
    return ray.data.read_json(request["path"]).columns()


if __name__ == "__main__":
    main({"mixture": mixture, "naive": naive, "read": read})
