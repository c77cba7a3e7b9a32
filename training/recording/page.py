"""The report of a run: one page that needs no network, readable on a phone, dark or printed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from training import memory
from training.errors import UserError
from training.recording import figures
from training.recording.log import write_text

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1d21; --paper: #fff; --soft: #666d78; --line: #d5d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --paper: #15171b; --soft: #9aa2ae; --line: #383d46; }
}
body { margin: 0 auto; padding: 1rem; max-width: 75rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem;
  border-bottom: 1px solid var(--line); } p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.side { display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; max-width: 36rem; break-inside: avoid; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: currentColor; font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } .facts td + td { white-space: normal; overflow-wrap: anywhere; }
th { vertical-align: bottom; }
@media (max-width: 30rem) { table { font-size: .8rem; } td, th { padding-right: .6rem; } }
td.number, th.number { text-align: right; }
code { overflow-wrap: anywhere; }
@media print {
  :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; color-scheme: light; }
  body { max-width: none; font-size: 10pt; } }
"""


# ---- parts of any page -------------------------------------------------------------


def document(title: str, body: Iterable[str]) -> str:
    """A whole page; `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"</head><body>\n<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def table(rows: list[list[Any]], header: list[str], kind: str = "") -> str:
    """Columns of numbers stand right. kind: "facts" for names and values of any length."""
    cells = [[number(value) for value in row] for row in rows]
    numeric = [
        kind != "facts" and all(text[:1].isdigit() or text[:1] in "-+–" for text in column)
        for column in zip(*cells, strict=True)
    ]

    def line(texts: list[str], tag: str) -> str:
        marks = [' class="number"' if right else "" for right in numeric]
        parts = zip(marks, texts, strict=True)
        return "".join(f"<{tag}{mark}>{escape(text)}</{tag}>" for mark, text in parts)

    lines = [line(header, "th"), *(line(row, "td") for row in cells)]
    body = "".join(f"<tr>{text}</tr>\n" for text in lines)
    return f'<div class="wide"><table class="{kind}">\n{body}</table></div>'


def number(value: Any) -> str:
    """For people: four digits, thousands apart, "–" for what is not there."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 100 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def picture(caption: str, draw: Callable[..., str], *what: Any) -> str:
    """A figure. One that fails says so in its place: it must not cost the page, or the run."""
    try:
        drawn = draw(*what)
    except Exception as error:
        return paragraph(f"{caption}: not drawn ({type(error).__name__}: {error})", "soft missing")
    if not drawn:
        return ""
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def side(*parts: str) -> str:
    """Parts beside each other where the window is wide enough."""
    return "\n".join(['<div class="side">', *filter(None, parts), "</div>"])


# ---- a run -------------------------------------------------------------------------


def write_run_page(metrics: Path, run_json: Path, page: Path) -> None:
    """Writes the report of a run, finished or not, from what it has recorded.

    Raises: UserError if the files are not those of a run.
    """
    try:
        facts = json.loads(run_json.read_text(encoding="utf-8"))
        lines = metrics.read_text(encoding="utf-8").splitlines()
        # a killed run may have written half a line
        records = [json.loads(line) for line in lines if line.endswith("}")]
    except ValueError as error:
        raise UserError(
            f"{metrics} and {run_json} are not the records of a run: {error}"
        ) from None
    write_text(page, run_page(metrics.name.removesuffix(".metrics.jsonl"), records, facts))


def run_page(name: str, records: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page of a run from its events and its run.json, of this version or an older one."""
    start = next((r for r in records if r["event"] == "start"), {})
    thresholds = start.get("thresholds")
    if thresholds is None:  # runs recorded before criteria had names
        thresholds = {"skewness": start.get("skewness"), "change_percent": start.get("distance")}
    thresholds = {key: value for key, value in thresholds.items() if value is not None}
    config, resolved = facts.get("config", {}), facts.get("resolved", {})
    task = config.get("task", start.get("task", "?"))
    seed = resolved.get("seed", start.get("seed", "?"))
    body = [paragraph(f"{facts.get('started', '')} · {facts.get('device', '')}", "soft")]
    for section in (_result, _when, _what, _cost, _setup):
        body += section(records, facts, thresholds)
    return document(f"{task}, {name}, seed {seed}", body)


def _of(records: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] == event]


def _result(records, facts, thresholds) -> list[str]:
    train, evals, result = _of(records, "train"), _of(records, "eval"), facts.get("result")
    steps = train[-1]["step"] if train else 0
    planned = facts.get("config", {}).get("training", {}).get("num_train_steps")
    told = f"Not finished: {steps:,} of {number(planned)} steps are done."
    if result is not None:
        told = (
            f"Test accuracy {result['test_accuracy']:.4f} on "
            f"{number(result.get('num_test_examples'))} examples, loss {result['test_loss']:.4f}, "
            f"with {result['attention']} attention, after {result['steps']:,} steps. The model "
            f"tested is that of step {number(result.get('best_step'))}, dev accuracy "
            f"{number(result.get('best_dev_accuracy'))}."
        )
    body = ["<h2>Result</h2>", paragraph(told)]
    if train:
        caption = f"Loss and accuracy over the run{'.' if evals else '; no evaluation yet.'}"
        rows = [
            [r["step"], r["phase"], f"{r['loss']:.4f}", f"{r['accuracy']:.4f}"]
            for r in evals[-12:]
        ]
        header = ["step", "phase", "dev loss", "dev accuracy"]
        last = table(rows, header) if rows else ""
        body.append(side(picture(caption, figures.course, records), last))
    return body


def _when(records, facts, thresholds) -> list[str]:
    chosen = [record for record in records if "active_blocks" in record]
    dense = [r for r in _of(records, "train") if r["phase"] == "dense"]
    told, outlook = "", ""
    if chosen and dense:
        told = f"Sparse after {chosen[0]['step']:,} dense steps: {chosen[0].get('reason', '')}."
    elif chosen:
        step = chosen[0]["step"]
        prefix = f"It began sparse, from a dense prefix of {step:,} steps."
        told = prefix if step else "It was sparse from the start."
    elif dense:
        told, ends = "It never switched: all of its training was dense.", _of(records, "end")
        outlook = ends[-1].get("outlook", "") if ends else ""
    body = ["<h2>When it switched, and why</h2>", paragraph(told), paragraph(outlook, "soft")]
    if len(chosen) > 1:
        last = chosen[-1]["step"]
        body.append(
            paragraph(f"Blocks were chosen {len(chosen)} times, last after step {last:,}.")
        )
    if dense:
        now = dense[-1]
        looked_at = [name for name in thresholds if isinstance(now.get(name), list)]
        rows = [[name.replace("_", " "), thresholds[name], *now[name]] for name in looked_at]
        layers = range(len(now[looked_at[0]]) if looked_at else 0)
        header = [f"step {now['step']:,}", "threshold", *(f"layer\u00a0{i}" for i in layers)]
        caption = "What the criterion looked at, against its thresholds."
        drawn = picture(caption, figures.criterion, records, thresholds)
        body.append(side(drawn, table(rows, header) if rows else ""))
    return body


def _what(records, facts, thresholds) -> list[str]:
    pictured = [record for record in records if record.get("num_blocks")]
    chosen = [record for record in records if "active_blocks" in record]
    drawn = []
    # the first and the last choice of blocks, or the attention of a run that made none
    for event in pictured[:1] + pictured[1:][-1:]:
        keys = {"attention": "pooled", "kept blocks": "kept_blocks"}
        parts = " and ".join(words for words, key in keys.items() if event.get(key))
        caption = f"{parts} after step {event['step']:,}.".capitalize()
        if not event.get("pooled"):
            caption += " No attention was measured."
        drawn.append(picture(caption, figures.blocks, event))
    caption = (
        "Share of the attention in the blocks that are kept (while dense: would be), in the best "
        "blocks of that number, and, were attention uniform, in the kept ones."
    )
    drawn.append(picture(caption, figures.kept, records))
    drawn.append(picture("Other observations.", figures.others, records, thresholds))
    nothing = "" if chosen else "Every block: no pattern was chosen."
    body = ["<h2>What it kept</h2>", paragraph(nothing), side(*drawn)]
    if chosen:
        last = chosen[-1]
        columns = {
            key.replace("_", " "): value
            for key, value in last.items()
            if isinstance(value, list) and not any(isinstance(entry, list) for entry in value)
        }
        layers = enumerate(zip(*columns.values(), strict=True))
        rows = [[f"layer\u00a0{i}", *row] for i, row in layers]
        body.append(table(rows, [f"after step {last['step']:,}", *columns]))
    return body


def _cost(records, facts, thresholds) -> list[str]:
    train = _of(records, "train")
    body = ["<h2>What it cost</h2>"]
    if not train:
        return [*body, paragraph("No step was trained yet.")]
    _, took, phases = figures.step_seconds(records)
    flops = facts.get("flops_per_step", {})
    rows: list[list[Any]] = []
    median = {}
    for phase in dict.fromkeys(phases):
        here = [seconds for seconds, p in zip(took, phases, strict=True) if p == phase]
        median[phase] = statistics.median(here)
        peak = max(r["peak_memory_bytes"] for r in train if r["phase"] == phase)
        work = flops.get(phase, {}).get("step")
        rows.append(
            [
                phase,
                len(here),
                f"{median[phase] * 1e3:,.0f}",
                duration(sum(here)),
                f"{sum(here) / sum(took):.0%}",
                memory.human(peak),
                "–" if work is None else f"{number(work / median[phase] / 1e9)}",
            ]
        )
    if len(median) > 1:
        speedup = median["dense"] / median["sparse"]
        body.append(
            paragraph(
                f"A sparse step takes {median['sparse'] * 1e3:,.0f} ms, a dense one "
                f"{median['dense'] * 1e3:,.0f} ms: {speedup:.2f} times as fast. "
                f"{rows[0][4]} of the training time went into the {rows[0][1]:,} dense steps, "
                f"{rows[0][1] / len(took):.0%} of all."
            )
        )
    header = ["phase", "steps", "ms/step", "time", "share", "memory", "GFLOP/s"]
    caption = "Milliseconds a step (in the table: median), evaluations not counted; peak memory."
    body.append(side(table(rows, header), picture(caption, figures.pace, records)))
    return body


def _setup(records, facts, thresholds) -> list[str]:
    body = ["<h2>Configuration, versions, commands</h2>"]
    halved = facts.get("halved_micro_batches")
    if halved:
        sizes = ", ".join(f"{h['micro_batch_size']} at step {h['step']:,}" for h in halved)
        body.append(paragraph(f"Memory ran out; the micro-batch was halved to {sizes}."))
    body.append(f"<p><code>{escape(facts.get('command', '?'))}</code></p>")
    tables, config = [], facts.get("config", {})
    for title, section in (
        ("model", config.get("model")),
        ("training", config.get("training")),
        ("resolved at the start", facts.get("resolved")),
        ("versions", facts.get("versions")),
        *((f"started at step {s['step']:,}", s) for s in facts.get("sessions", [])),
    ):
        if section:
            rows = [[key, _text(v)] for key, v in section.items() if v != facts.get("command")]
            tables.append(table(rows, [title, ""], "facts"))
    return [*body, side(*tables)]


def _text(value: Any) -> Any:
    """A value of run.json in a cell."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(inner)}" for name, inner in value.items())
    return json.dumps(value) if isinstance(value, list) else value
