"""How each program reads what it is given: transcriptions of the programs' own parsers, in plain Python.

Each module has ``READERS``: from a format's name to a function of the exported files and the sizes of the domains'
files, which returns how many units (or what share of them) the program would draw from each path, or name where the
program knows domains by name.  A reader fails where the program would.
"""
