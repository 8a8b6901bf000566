"""compare.html: one page that needs nothing else, to be looked at."""

from base64 import b64encode
from collections.abc import Iterator
from html import escape
from string import Template
from typing import Any

from lora_cli.run.compare_plot import colour
from lora_cli.run.compare_report import columns, facts, notes, rows, title, verdict

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
$refresh<title>$title</title>
<style>
  body { margin: 0; background: #f6f6f4; color: #222; font: 15px/1.55 system-ui, sans-serif; }
  main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
  h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
  .facts, .notes { color: #666; font-size: 13.5px; margin: 0; }
  .verdict { font-size: 18px; line-height: 1.5; max-width: 46em; margin: 22px 0 26px; }
  .card { background: #fff; border: 1px solid #e4e4e0; border-radius: 10px; padding: 18px; margin: 0 0 20px; }
  .scroll { overflow-x: auto; }
  img { display: block; width: 100%; height: auto; }
  table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; white-space: nowrap; vertical-align: top; }
  th { font-weight: 500; color: #666; padding: 6px 12px; border-bottom: 1px solid #ddd; }
  td { padding: 9px 12px; border-bottom: 1px solid #eee; }
  tr:last-child td { border-bottom: 0; }
  th:first-child, td:first-child { text-align: left; padding-left: 2px; }
  td small { display: block; color: #777; font-size: 12px; font-weight: 400; }
  td:first-child small { white-space: normal; max-width: 26em; }
  .base td { color: #777; }
  .dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
  .best { font-weight: 700; }
  .failed { color: #a3320b; }
  .notes { padding-left: 18px; }
  summary { cursor: pointer; color: #666; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="facts">$facts</p>
<p class="verdict">$verdict</p>
<div class="card"><img alt="Training loss of every variant; below it scores, forgetting, memory and time"
src="data:image/png;base64,$picture"></div>
<div class="card scroll"><table>
<thead><tr><th>variant</th>$head</tr></thead>
<tbody>
$body
</tbody>
</table></div>
<ul class="notes">$notes</ul>
<div class="card scroll" style="margin-top: 20px"><details><summary>every run</summary>
<table><thead><tr><th>variant</th><th>seed</th>$head</tr></thead><tbody>
$runs
</tbody></table></details></div>
<p class="facts">lora $version · $folder</p>
</main>
</body>
</html>
""")


def page(made: dict[str, Any], picture: bytes) -> str:
    """The HTML; while runs are missing it loads itself again."""
    going_on = made["finished"] + made["failed"] < made["runs"]
    return PAGE.substitute(
        refresh='<meta http-equiv="refresh" content="20">\n' if going_on else "",
        title=escape(title(made)),
        facts=escape(" · ".join(facts(made))),
        verdict=escape(verdict(made)),
        picture=b64encode(picture).decode("ascii"),
        head="".join(f"<th>{escape(column.title)}</th>" for column in columns(made)),
        body="\n".join(_rows(made)),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes(made)),
        runs="\n".join(_runs(made)),
        version=escape(made["version"]),
        folder=escape(made["folder"]),
    )


def _rows(made: dict[str, Any]) -> Iterator[str]:
    """A line of the table each; intervals in small below their mean."""
    numbers = {variant["name"]: number for number, variant in enumerate(made["variants"])}
    failed = {variant["name"] for variant in made["variants"] if variant["errors"]}
    for name, told, cells, winners in rows(made):
        own = numbers.get(name)
        dot = f'<span class="dot" style="background: {colour(own)}"></span>' if own is not None else ""
        said = f"<small{' class=failed' if name in failed else ''}>{escape(told)}</small>"
        line = "".join(_cell(text, wins) for text, wins in zip(cells, winners, strict=True))
        yield f"<tr{' class=base' if own is None else ''}><td>{dot}{escape(name)}{said}</td>{line}</tr>"


def _cell(text: str, best: bool) -> str:
    mean, bracket, interval = text.partition(" (")
    below = f"<small>{escape(interval.rstrip(')'))}</small>" if bracket else ""
    return f"<td{' class=best' if best else ''}>{escape(mean)}{below}</td>"


def _runs(made: dict[str, Any]) -> Iterator[str]:
    """A line for each run."""
    shown = columns(made)
    for variant in made["variants"]:
        for run in variant["runs"]:
            known = {**run, **run.get("after", {})}
            cells = "".join(
                f"<td>{escape(each.shown(known[each.key]))}</td>"
                if known.get(each.key) is not None
                else "<td></td>"
                for each in shown
            )
            yield f"<tr><td>{escape(variant['name'])}</td><td>{run['seed']}</td>{cells}</tr>"
