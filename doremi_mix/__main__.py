"""``python -m doremi_mix`` is ``doremi-mix``."""

from doremi_mix.cli import main

main()
