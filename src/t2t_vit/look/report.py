"""Reports: one HTML file that contains its pictures and needs neither a network nor other files."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
       background: #fff }
h1 { line-height: 1.2 } h2 { margin-top: 3rem; border-bottom: 1px solid #ccc } h3 { margin-top: 2rem }
figure { margin: 1.5rem 0 } figcaption { color: #444; font-size: .9rem } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .85rem } td, th { padding: .15rem .7rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
nav a { margin-right: 1rem } details { margin: 1rem 0 }
""".strip()


class Picture(NamedTuple):
    """A PNG file with its caption."""

    caption: str
    file: Path


@dataclass
class Section:
    """A chapter: text, pictures, then tables, which are rows with headings first, by title."""

    title: str
    text: str = ''
    pictures: list[Picture] = field(default_factory=list)
    tables: dict[str, list[Sequence[str]]] = field(default_factory=dict)

    def html(self, number: int) -> str:
        """Return the section as HTML that contains its pictures."""
        parts = [f'<h2 id="part{number}">{escape(self.title)}</h2>']
        parts += [f'<p>{escape(self.text)}</p>'] if self.text else []
        for caption, file in self.pictures:
            data = base64.b64encode(file.read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
                f'<figcaption>{escape(caption)}</figcaption></figure>'
            )
        for title, rows in self.tables.items():
            cells = [
                ''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)
                for tag, row in zip(('th', *['td'] * len(rows)), rows)
            ]
            parts.append(
                f'<details><summary>{escape(title)}</summary><table>'
                + ''.join(f'<tr>{row}</tr>' for row in cells)
                + '</table></details>'
            )
        return '\n'.join(parts)


def write_report(file: Path, title: str, text: str, sections: Sequence[Section]) -> None:
    """Write sections with a title and links to each of them."""
    links = ''.join(f'<a href="#part{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    body = '\n'.join(section.html(i) for i, section in enumerate(sections))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n'
        f'<h1>{escape(title)}</h1>\n<p>{escape(text)}</p>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n',
        encoding='utf-8',
        errors='backslashreplace',  # file names that are not UTF-8
    )
