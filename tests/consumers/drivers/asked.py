"""What every driver does: read the request, run the task that it names, write the answer.

A driver runs under the consumer's Python and imports the consumer and the standard library only.
"""

import json
import sys
from pathlib import Path


def main(tasks):
    """Runs one of the driver's tasks: functions from the request (a dict) to the answer (JSON)."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = tasks[request["task"]](request)
    Path(sys.argv[2]).write_text(json.dumps(answer, ensure_ascii=False), encoding="utf-8")
