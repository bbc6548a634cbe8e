"""The frame of an HTML page that needs neither a network nor a program, and the files beside it."""

import base64
import datetime
import html
import importlib.metadata
import platform
from collections.abc import Iterable
from string import Template
from typing import TYPE_CHECKING

from etils import epath

from compat_jax.files import write_bytes
from compat_jax.report import style
from compat_jax.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGES = ("compat_jax", "jax", "flax", "optax", "numpy", "matplotlib")

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1b1f24; --muted: #57606a; --line: #d8dee4; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 20px 64px; max-width: 1240px; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 36px 0 4px; }
h2 { font-size: 21px; margin: 48px 0 4px; padding-top: 12px; border-top: 1px solid var(--line); }
p { margin: 6px 0 14px; max-width: 76ch; }
.muted, figcaption { color: var(--muted); font-size: 14px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 16px 0 8px; font-size: 15px; }
a { color: var(--accent); }
nav a { padding: 4px 0; text-decoration: none; border-bottom: 1px solid var(--line); }
.says { border-left: 4px solid var(--accent); padding: 2px 0 2px 14px; margin: 18px 0; }
.says p { margin: 6px 0; }
.grid { display: grid; gap: 20px 32px; align-items: start; margin: 14px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 600px; height: auto; }
.scroll { overflow-x: auto; margin: 10px 0; background:
  linear-gradient(to left, #fff 30%, #fff0) right / 48px 100% no-repeat local,
  linear-gradient(to left, #1b1f2433, #1b1f2400) right / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: left; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); }
td { vertical-align: top; white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 18em; max-width: 34em; }
th.n, td.n { text-align: right; padding-left: 12px; max-width: 12em; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
.strong td { font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); padding: 6px 0; }
footer { margin-top: 48px; border-top: 1px solid var(--line); padding-top: 12px; }
@media (max-width: 600px) {
  body { padding: 0 14px 40px; font-size: 15px; }
  h1 { font-size: 24px; margin-top: 22px; }
  h2 { margin-top: 34px; }
  td:first-child { white-space: normal; min-width: 8em; max-width: 9em; }
}
@media print { nav { display: none; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<h1>$title</h1>
<p class="muted">$subtitle</p>
<nav>$links</nav>
<main>
$sections
</main>
<footer class="muted">$footer</footer>
</body>
</html>
""")


class Folder:
    """The files of a report; pictures and tables are written as they are put on the page."""

    def __init__(self, path: epath.Path):
        self.path = epath.Path(path)
        self.written: list[epath.Path] = []

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        write_bytes(self.path / name, content)
        self.written.append(self.path / name)

    def picture(self, name: str, drawn: "Figure", says: str, caption: str = "") -> str:
        """Write a picture, and return it as HTML with its bytes inside."""
        content = style.png(drawn)
        self.write(f"{name}.png", content)
        data = base64.b64encode(content).decode()
        under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        return (
            f'<figure><img alt="{html.escape(says)}" src="data:image/png;base64,{data}">'
            f"{under}</figure>"
        )

    def table(self, name: str, table: Table) -> str:
        """Write a table as CSV, and return it as HTML."""
        self.write(f"{name}.csv", table.csv().encode())
        return table.html()


def compose(title: str, subtitle: str, sections: Iterable[tuple[str, str]]) -> str:
    """Compose a page that needs neither a network nor a program.

    Args:
      title: of the page, plain text.
      subtitle: below it, HTML.
      sections: name, plain text, and content, HTML; those without content are left out.

    Returns:
      HTML.
    """
    shown = [(name, text) for name, text in sections if text]
    links = [f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name, _ in shown]
    return _PAGE.substitute(
        title=html.escape(title),
        subtitle=subtitle,
        links="".join(links) if len(links) > 1 else "",
        sections="\n".join(
            f'<section><h2 id="{_anchor(name)}">{html.escape(name)}</h2>\n{text}</section>'
            for name, text in shown
        ),
        footer=_footer(),
    )


def _anchor(name: str) -> str:
    return style.file_name(name).lower()


def paragraph(*sentences: str, muted: bool = False) -> str:
    """Return plain sentences as a paragraph; "" without any."""
    text = html.escape(" ".join(filter(None, sentences))).replace(" %", "&nbsp;%")
    kind = ' class="muted"' if muted else ""
    return f"<p{kind}>{text}</p>" if text else ""


def grid(parts: Iterable[str]) -> str:
    """Return parts, HTML, beside each other where the page is wide enough."""
    return f'<div class="grid">{"".join(parts)}</div>'


def details(title: str, inside: str) -> str:
    """Return HTML that a click on its title, plain text, unfolds."""
    return f"<details><summary>{html.escape(title)}</summary>{inside}</details>"


def _footer():
    versions = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return html.escape(f"Written {today} with {', '.join(versions)}.")
