"""Writes the table of export formats, with what was proven, into the README.

python scripts/consumers_table.py
"""

from pathlib import Path

from doremi_mix.export_files import list_formats
from doremi_mix.report.format_table import markdown_formats

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- formats: written by scripts/consumers_table.py -->\n", "<!-- end of formats -->\n"


def main() -> None:
    """Replaces what stands between the two marks."""
    before, rest = README.read_text(encoding="utf-8").split(START)
    _, after = rest.split(END)
    README.write_text(f"{before}{START}\n{markdown_formats(list_formats())}\n{END}{after}", encoding="utf-8")
    print(f"wrote the table of formats into {README.name}")


if __name__ == "__main__":
    main()
