"""Write docs/settings.md, the reference of what ``tidegate serve`` can be told."""

from __future__ import annotations

from pathlib import Path

from tidegate.cli.config import FLAGS, SECTIONS, plain
from tidegate.cli.sources import PREFIX

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# Settings of `tidegate serve`

A flag wins over the environment, the environment over the file (`--config FILE`, TOML), the file over the
default. A key that the file may not have is an error, and all errors are told at once. `--print-config` shows
what is in force and where it came from, as a file that `--config` reads. (`scripts/settings_page.py` writes
this page.)
"""


def page() -> str:
    """Return the page: a table for each section of the file."""
    lines = [HEAD]
    for section, kind in SECTIONS.items():
        lines += [
            f"## `[{section}]`",
            "",
            "| key | flag | environment | default | |",
            "|---|---|---|---|---|",
        ]
        for name, field in kind.model_fields.items():
            flag = FLAGS.get(name)
            default = plain(field.default)
            shown = f"`{default}`" if default is not None else ""
            if flag and isinstance(flag.shown, str):
                shown = flag.shown
            option = (
                f"`{flag.name or flag.spelling(name)}{f' {flag.metavar}' if flag.metavar else ''}`"
                if flag
                else ""
            )
            text = flag.help if flag else field.description or ""
            row = (
                f"`{name}`",
                option,
                f"`{PREFIX}{name.upper()}`",
                shown,
                text,
            )
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
