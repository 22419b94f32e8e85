"""The HTML page of an evaluation: its text, tables and figures in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from commands.evaluate.biometrics import ENOUGH_ERRORS, LEAST_ERRORS
from commands.evaluate.figures import draw_figures
from commands.evaluate.report_text import (
    COMPARISON_HEAD,
    EXTRAPOLATED_NOTE,
    SUBGROUP_HEAD,
    SUBGROUP_NOTE,
    Result,
    cautions,
    comparison_rows,
    failure_rows,
    introduction,
    per_cent,
    protocol,
    recommendation,
    search_head,
    search_rows,
    subgroup_rows,
)

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #d9dee4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ed; --paper: #15181c; --soft: #3a4048; }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
pre { padding: .75rem; border: 1px solid var(--soft); border-radius: .4rem; white-space: pre-wrap }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .4rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--soft) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-weight: 600; font-size: .95rem }
figure img { width: 100%; height: auto; border-radius: .4rem }
"""

_METHOD = f"""
<ul>
<li>Each photo goes through the service's own pipeline. FMR and FNMR count all pairs of photos that passed. A refused
photo is a failure to acquire (FTA). <em>FRR of attempts</em> includes refused photos as ISO/IEC 19795-1 does:
FTA + FNMR·(1 &minus; FTA). The JSON file also has FAR, and GFRR and GFAR, which include failed enrolments: the first
photo of a person was refused (FTE).</li>
<li>A score at the threshold is a match, as in the service. A threshold is the lowest one, to four decimals, at which
the share of false matches is at most the wanted one.</li>
<li>Intervals are Wilson's 95 % at the effective number of trials. Pairs that share a person are not independent: the
variance is a sum over people. Where no error was seen, each person (FNMR) or each pair of people (FMR) counts as one
trial.</li>
<li>A rate is "not measurable" where fewer than {LEAST_ERRORS} errors are expected (rule of 3), and "uncertain" below
{ENOUGH_ERRORS} (rule of 30).</li>
<li>1:N: the gallery holds each person's first photo that passed. FNIR: another photo of the person is missed or taken
for another person. FPIR: every photo searches as a stranger, without the person's own entry.</li>
</ul>
"""


def page(result: Result) -> str:
    """The whole report as one HTML file, which loads no other file."""
    title = f"Face recognition, evaluated on {result['made']['folder']}"
    found = result["searches"]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(introduction(result))} Made {html.escape(result['made']['at'])}.</p>",
        "<h2>Recommended thresholds</h2>",
        *(f"<p>{html.escape(recommendation(one, result))}</p>" for one in result["recommended"]),
        *_env(result),
        "<h2>Please note</h2>",
        "<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in cautions(result)) + "</ul>",
        "<h2>Comparing two photos (1:1)</h2>",
        _table("At the thresholds for a wanted FMR, and at VERIFY_THRESHOLD", COMPARISON_HEAD, comparison_rows(result)),
        _equal_error(result["comparisons"]),
        f'<div class="figures">{"".join(_figure(title, svg) for title, svg in draw_figures(result))}</div>',
        "<h2>Searching everybody (1:N)</h2>",
        _table(
            f"A gallery of {found['gallery']:,} people; strangers meet {found['gallery'] - 1:,}",
            search_head(result),
            search_rows(result),
        ),
        f"<p>{html.escape(EXTRAPOLATED_NOTE)}</p>",
        "<h2>Photos that were refused</h2>",
        _table("Failure to acquire and to enrol, by reason", ("", ""), failure_rows(result)),
    ]
    if result["protocol"]:
        parts += ["<h2>LFW's protocol</h2>", *(f"<p>{html.escape(one)}</p>" for one in protocol(result))]
    if result["subgroups"]:
        left_out = result["subgroups"]["unnamed_people"]
        parts += [
            "<h2>By group</h2>",
            _table("Impostor pairs are two people of the same group", SUBGROUP_HEAD, subgroup_rows(result)),
            f"<p>{html.escape(SUBGROUP_NOTE)} {left_out:,} people are in no group.</p>",
        ]
    parts += ["<h2>How this was measured</h2>", _METHOD]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _figure(title: str, svg: bytes) -> str:
    name, data = html.escape(title), base64.b64encode(svg).decode()
    return f'<figure><figcaption>{name}</figcaption><img src="data:image/svg+xml;base64,{data}" alt="{name}"></figure>'


def _env(result: Result) -> list[str]:
    lines = [f"# {one['for'].upper()} {one['wanted']:g}\n{one['line']}" for one in result["recommended"] if one["line"]]
    return [
        f"<p>Put one of these lines into <code>.env</code>:</p><pre>{html.escape(chr(10).join(lines))}</pre>"
    ] * bool(lines)


def _equal_error(pairs: Result) -> str:
    if pairs["equal_error_rate"] is None:
        return ""
    rate = per_cent(pairs["equal_error_rate"]) if pairs["equal_error_rate"] else "none seen"
    return f"<p>Equal error rate: {rate}, at {pairs['equal_error_threshold']:.4f}.</p>"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{html.escape(one)}</th>' for one in head)
    # A line may break only before the bracket of an interval.
    cells = (
        [
            html.escape(cell).replace("&gt; ", "&gt;&nbsp;").replace(" %", "&nbsp;%").replace(" to ", "&nbsp;to&nbsp;")
            for cell in row
        ]
        for row in rows
    )
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    name = html.escape(caption)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )
