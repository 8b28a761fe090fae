"""The look of the report."""

CSS = """
:root { --ink: #1d2733; --faint: #6b7785; --rule: #e3e8ee; --good: #00714f; --bad: #b3450a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
header { margin: 0 0 28px; }
h1 { font-size: 29px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 14px; }
h3 { font-size: 16px; margin: 26px 0 10px; }
p { margin: 0 0 12px; max-width: 78ch; }
.facts { color: var(--faint); max-width: none; }
section { background: #fff; border: 1px solid var(--rule); border-radius: 10px;
  padding: 26px 28px; margin: 0 0 20px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--rule);
  vertical-align: baseline; white-space: nowrap; }
th { font-weight: 600; color: var(--faint); font-size: 13px; }
.n { text-align: right; padding-right: 0; padding-left: 22px; }
td small { display: block; color: var(--faint); font-size: 11px; line-height: 1.2; }
.best { font-weight: 650; }
.best small { font-weight: 400; }
.faint { color: var(--faint); }
.badge { display: inline-block; min-width: 62px; text-align: center; font-size: 12px;
  font-weight: 600; padding: 1px 9px; border-radius: 9px; background: #eef1f4;
  color: var(--faint); }
.hit .badge, .good .badge { background: #e2f4ec; color: var(--good); }
.missed .badge, .bad .badge { background: #fdebe0; color: var(--bad); }
.targets td:first-child { padding-right: 14px; }
figure { margin: 0 0 22px; padding: 0 0 0 14px; border-left: 3px solid var(--rule); }
figure.good { border-color: #8fd0b6; }
figure.bad { border-color: #f0b48c; }
.cases.region { display: grid; grid-template-columns: 1fr 1fr; gap: 0 24px; }
figcaption { margin: 0 0 8px; }
figure img, figure svg { display: block; max-width: 100%; height: auto; margin: 0 0 6px; }
figure p { margin: 0 0 2px; font-size: 14px; }
.answer { font-style: italic; }
.options { margin: 4px 0; padding-left: 18px; font-size: 14px; }
.options small { color: var(--faint); }
.label { color: #00805c; font-weight: 600; }
.predicted { color: #c25400; font-weight: 600; }
.charts { display: flex; flex-wrap: wrap; gap: 14px 22px; margin: 0 0 20px; }
.columns { display: flex; flex-wrap: wrap; gap: 10px 60px; }
svg text { font-family: inherit; }
pre { background: #f4f6f8; border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font: 12px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--faint); }
"""
