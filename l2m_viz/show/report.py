"""One self-contained HTML page: pictures, numbers with their units, settings and versions; nothing is fetched."""

import base64
import html
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from l2m_viz import __version__
from l2m_viz.data.files import write_text

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #8886; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; }
figcaption { opacity: .8; font-size: .92rem; }
table { border-collapse: collapse; margin: .8rem 0; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr { border-bottom: 1px solid #8883; }
"""


@dataclass(frozen=True)
class Picture:
    """Encoded picture with its caption; ``mime`` is image/png or image/webp."""

    data: bytes
    caption: str
    mime: str = "image/png"


@dataclass(frozen=True)
class Number:
    """One measured figure."""

    name: str
    value: float | int
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the report."""

    title: str
    text: str = ""
    numbers: list[Number] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def write_report(path: str | Path, title: str, sections: list[Section], settings: dict[str, str]) -> None:
    """Write the page atomically."""
    body = "".join(_section(section) for section in sections)
    facts = {**settings, **versions()}
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    write_text(
        path,
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{body}<h2>Settings and versions</h2><table>{rows}</table></body></html>",
    )


def versions() -> dict[str, str]:
    """Versions that decide the numbers."""
    packages = ("torch", "numpy", "numba", "opencv-python-headless", "scikit-image", "kornia")
    found = {f"{package} version": metadata.version(package) for package in packages}
    return {
        "l2m_viz version": __version__,
        **found,
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.numbers:
        parts.append(f"<table>{''.join(_row(number) for number in section.numbers)}</table>")
    for picture in section.pictures:
        encoded = base64.b64encode(picture.data).decode()
        caption = html.escape(picture.caption)
        parts.append(
            f"<figure><img alt='{html.escape(picture.caption, quote=True)}' src='data:{picture.mime};base64,{encoded}'>"
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "".join([*parts, "</section>"])


def _row(number: Number) -> str:
    value = f"{number.value:,}" if isinstance(number.value, int) else f"{number.value:.4g}"
    cells = (f"<td>{html.escape(number.name)}</td><td class='number'>{html.escape(value)}</td>",
             f"<td>{html.escape(number.unit)}</td><td>{html.escape(number.note)}</td>")  # fmt: skip
    return f"<tr>{''.join(cells)}</tr>"
