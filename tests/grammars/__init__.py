"""How each program reads what it is given: transcriptions of the programs' own parsers, in plain Python.

Each module has ``READERS``: from a format's name to a function of the exported files and the sizes of the domains'
files, which returns what the program would draw from each path, or name where the program knows domains by name: whole
numbers where the files fix how many units, shares of any sum where they do not.  A reader fails where the program
would.
"""


class Drawn(dict):
    """Units by path or name, and what else the files say of the drawing, under the names of ``WANTED``."""

    def __init__(self, units, **said):
        super().__init__(units)
        self.said = said


WANTED = {
    "total": lambda plan, export: export.num_drawn,
    # Units after which the program stops, where it would draw more.
    "limit": lambda plan, export: None if plan.budget is None else sum(plan.counts().values()),
    "tokens": lambda plan, export: plan.token_budget,
    # How often the program may draw all of a domain.
    "most_passes": lambda plan, export: dict.fromkeys(export.expected, plan.max_epochs),
    "objective": lambda plan, export: {name: plan.learned[name] for name in export.expected},
}
"""What the plan and the export say of the same."""
