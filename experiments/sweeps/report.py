"""SWEEP/sweep.html and SWEEP/sweep.csv: the runs side by side. One file, no network."""

import html
from collections.abc import Sequence
from typing import Any

from etils import epath

from experiments.sweeps import plots, significance, table
from experiments.sweeps.options import leaves
from experiments.sweeps.runs import Run, short_labels
from experiments.sweeps.table import Outcome
from tpo_jax.data import files
from tpo_jax.evaluation.charts import number
from tpo_jax.evaluation.page import CSS

MOST_CURVES = 8
_STYLE = """
main { max-width: 1240px; }
th[data-column] { cursor: pointer; user-select: none; }
th[aria-sort=ascending]::after { content: " \\25b2"; }
th[aria-sort=descending]::after { content: " \\25bc"; }
tr.run:hover, tr.lit { background: #eef3f9; }
polyline.run { opacity: .85; cursor: pointer; }
body.some polyline.run:not(.lit) { opacity: .12; }
polyline.lit { stroke-width: 3; opacity: 1; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
.failed, .stopped { color: var(--bad); }
.charts { align-items: flex-end; }
"""
# Click a head to sort; a run under the pointer is lit everywhere.
_SCRIPT = """
const lit = (run, on) => {
  document.body.classList.toggle('some', on);
  document.querySelectorAll(`[data-run="${run}"]`).forEach(e => e.classList.toggle('lit', on));
};
document.querySelectorAll('[data-run]').forEach(e => {
  e.addEventListener('pointerenter', () => lit(e.dataset.run, true));
  e.addEventListener('pointerleave', () => lit(e.dataset.run, false));
});
document.querySelectorAll('th[data-column]').forEach(head => head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], column = +head.dataset.column;
  const down = head.getAttribute('aria-sort') === 'ascending';
  head.parentNode.querySelectorAll('th').forEach(h => h.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const key = row => row.cells[column].dataset.value;
  const order = (a, b) => {
    const x = key(a), y = key(b);
    if (x === '' || y === '') return (x === '') - (y === '');  // nothing comes last
    const n = x - y;
    return (Number.isNaN(n) ? x.localeCompare(y) : n) * (down ? -1 : 1);
  };
  [...body.rows].sort(order).forEach(row => body.append(row));
}));
"""


def write(out: epath.PathLike, runs: Sequence[Run], metric: str = "") -> epath.Path:
    """Writes both files and returns the path of the page.

    Args:
      metric: what runs are compared by; "" takes the first loss there is.
    """
    out = epath.Path(out)
    outcomes = [table.read(run) for run in runs]
    page = out / "sweep.html"
    files.write(out / "sweep.csv", table.to_csv(outcomes))
    files.write(page, build(out.name, outcomes, table.main_metric(outcomes, metric)))
    return page


def build(title: str, outcomes: Sequence[Outcome], metric: str | None) -> str:
    """The page as text."""
    higher = metric is not None and table.higher_is_better(metric)
    values = [one.final(metric) if metric else None for one in outcomes]
    hues = plots.colours(values, higher)
    sections = [
        ("Runs", _runs(outcomes, hues, metric)),
        ("What leads where", _coordinates(outcomes, values, hues, metric)),
        ("Better, or another seed?", _significance(outcomes, metric)),
        ("Curves", _curves(outcomes, hues, metric)),
        ("What all runs have in common", _common(outcomes)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{part}</section>" for name, part in sections if part)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{CSS}{_STYLE}</style></head><body><main>"
        f"{_header(title, outcomes, metric)}{body}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _header(title: str, outcomes: Sequence[Outcome], metric: str | None) -> str:
    states: dict[str, int] = {}
    for one in outcomes:
        states[one.progress.state] = states.get(one.progress.state, 0) + 1
    facts = [f"{len(outcomes)} runs: " + ", ".join(f"{n} {state}" for state, n in states.items())]
    ranked = [one for one in outcomes if metric and one.final(metric) is not None]
    if ranked:
        choose = max if table.higher_is_better(metric) else min
        best = choose(ranked, key=lambda one: one.final(metric))
        facts.append(f"best {_escape(metric)} {_figure(best.final(metric))}: {_name(best)}")
    return f"<header><h1>{_escape(title)}</h1><p class='facts'>{' · '.join(facts)}</p></header>"


def _runs(outcomes: Sequence[Outcome], hues: Sequence[str], metric: str | None) -> str:
    """The sortable table: what varied, how far, last and best values."""
    varied = table.varied_of(outcomes)
    labels = short_labels(varied)
    shown = _shown(outcomes, metric)
    heads = ["run", "state", "step", *(labels[path] for path in varied)]
    for name in shown:
        heads += [f"{name}<br><small>final</small>", f"{name}<br><small>best</small>"]
    head = "".join(
        f"<th data-column='{i}'{' class=n' if i > 1 else ''}>{text}</th>"
        for i, text in enumerate(heads)
    )
    best = {
        (name, which): _best(outcomes, name, which) for name in shown for which in ("final", "best")
    }
    rows = []
    for index, (one, hue) in enumerate(zip(outcomes, hues, strict=True)):
        swatch = f"<span class='swatch' style='background:{hue}'></span>"
        at = one.progress
        cells = [
            f"<td data-value='{_escape(one.run.name)}'>{swatch}{_name(one)}</td>",
            f"<td data-value='{at.state}' class='{at.state}'>{at.state}</td>",
            f"<td class=n data-value='{at.step}'>{at.step}</td>",
        ]
        for path in varied:
            value = one.run.varied.get(path)
            cells.append(_cell(value, "" if value is None else _option(value)))
        for name in shown:
            for which in ("final", "best"):
                value = getattr(one, which)(name)
                marked = value is not None and value == best[name, which]
                cells.append(_cell(value, _figure(value), " best" if marked else ""))
        rows.append(f"<tr class='run' data-run='{index}'>{''.join(cells)}</tr>")
    return (
        "<p>Click a head to sort. Colours go by "
        f"{_escape(metric or 'nothing yet')}: the darker, the better. All metrics are in "
        "sweep.csv.</p><div class='wide'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shown(outcomes: Sequence[Outcome], metric: str | None) -> list[str]:
    """The metrics of the table: the main one, evaluations, validation, and the training loss."""
    names = table.metrics_of(outcomes)
    kept = [
        name for name in names
        if name.startswith(("eval/", "validation/")) or name in ("train/loss", metric)
    ]  # fmt: skip
    return sorted(kept, key=lambda name: name != metric)


def _best(outcomes: Sequence[Outcome], metric: str, which: str) -> float | None:
    values = [v for one in outcomes if (v := getattr(one, which)(metric)) is not None]
    return (max if table.higher_is_better(metric) else min)(values, default=None)


def _coordinates(
    outcomes: Sequence[Outcome], values: Sequence[Any], hues: Sequence[str], metric: str | None
) -> str:
    varied = table.varied_of(outcomes)
    labels = short_labels(varied)
    axes = {labels[path]: [one.run.varied.get(path) for one in outcomes] for path in varied}
    if metric:
        axes[metric] = values
    chart = plots.parallel_coordinates(axes, hues)
    return f"<div class='wide'>{chart}</div>" if chart else ""


def _significance(outcomes: Sequence[Outcome], metric: str | None) -> str:
    names = [name for name in table.metrics_of(outcomes) if name.startswith("eval/")]
    found = [
        comparison
        for name in dict.fromkeys([*([metric] if metric else []), *names])
        for comparison in significance.compare(outcomes, name)
    ]
    if not found:
        return ""
    first = significance.settings_of(outcomes)[0][0]
    rows = []
    for one in found:
        d = one.difference
        word, kind = ("yes", "hit") if one.significant else ("not shown", "unknown")
        rows.append(
            f"<tr class='{kind}'><td><span class='badge'>{word}</span></td>"
            f"<td>{_setting(one.setting)}</td><td>{_escape(one.metric)}</td>"
            f"<td class=n>{d.value:+.4g}</td><td class='n faint'>[{d.low:+.4g}, {d.high:+.4g}]</td>"
            f"<td class=n>{one.seeds}</td><td class=n>{_p(one.p)}</td>"
            f"<td class=n>{_p(one.corrected)}</td></tr>"
        )
    return (
        f"<p>Each setting against the first, {_setting(first)}, on the seeds that both have "
        "finished: mean difference with its 95 % bootstrap interval over seeds (for evaluations "
        "over videos), and the exact sign-flip probability over seeds, also after Holm's "
        "correction. With n seeds it cannot fall below 2 / 2<sup>n</sup>: six are needed to pass "
        "0.05, and with fewer the interval is an impression.</p>"
        "<div class='wide'><table><tr><th></th><th>setting</th><th>metric</th>"
        "<th class=n>difference</th><th class=n>95 % interval</th><th class=n>seeds</th>"
        f"<th class=n>p</th><th class=n>corrected</th></tr>{''.join(rows)}</table></div>"
    )


def _curves(outcomes: Sequence[Outcome], hues: Sequence[str], metric: str | None) -> str:
    """The main metric first, then losses and validation; the rest folded away."""
    names = [name for name in table.metrics_of(outcomes) if not name.startswith("eval/")]
    first = (metric, "train/loss", "validation/loss")
    names = sorted(names, key=lambda n: first.index(n) if n in first else len(first))
    charts = [
        plots.curves([one.curves.get(name, ()) for one in outcomes], hues, title=name)
        for name in names
    ]
    more = "".join(charts[MOST_CURVES:])
    out = f"<div class='charts'>{''.join(charts[:MOST_CURVES])}</div>"
    if more:
        out += f"<details><summary>more</summary><div class='charts'>{more}</div></details>"
    return out if charts else ""


def _common(outcomes: Sequence[Outcome]) -> str:
    """The options that all runs share."""
    flat = [{path: repr(value) for path, value in leaves(one.run.config)} for one in outcomes]
    shared = [path for path in flat[0] if all(one.get(path) == flat[0][path] for one in flat)]
    lines = "\n".join(f"{path} = {flat[0][path]}" for path in shared)
    return f"<details><summary>{len(shared)} options</summary><pre>{_escape(lines)}</pre></details>"


def _name(one: Outcome) -> str:
    return _escape(one.run.name)


def _setting(setting: dict[str, Any]) -> str:
    labels = short_labels(list(setting))
    return _escape(", ".join(f"{labels[p]} = {_option(v)}" for p, v in setting.items()) or "all")


def _option(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _escape(value)


def _cell(value: Any, text: str, kind: str = "") -> str:
    raw = "" if value is None else _escape(value)
    return f"<td class='n{kind}' data-value='{raw}'>{text}</td>"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1000 else number(value)


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _escape(text: Any) -> str:
    return html.escape(str(text), quote=True)
