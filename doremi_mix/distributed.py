"""Which process of a distributed run this is; without torch when there is only one."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of this run.

    Attributes:
        index: of this one, 0 for the first.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Says whether this process writes and speaks."""
        return self.index == 0

    def from_main(self, value: str) -> str:
        """Returns the first process's value."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return str(values[0])

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def join_processes() -> Processes:
    """Joins the processes that ``accelerate launch`` (or torchrun) started; alone without them."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Processes()
    import torch
    from accelerate import PartialState

    # The others wait while the first one reads and tokenizes, which can take hours on large data.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(hours=24))
    return Processes(state.process_index, state.num_processes)
