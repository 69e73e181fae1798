"""The look of ``report.html`` and of results in a notebook."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--soft:#5c6675;--rule:#e1e5ea;--accent:#0b7a53;
--tint:#e5f4ed;--blue:#2f6fd6;--amber:#c27a06;--red:#c0392b;--quiet:#a9b4c2}
@media (prefers-color-scheme:dark){:root{--bg:#11151b;--card:#191f28;--ink:#e6eaf0;--soft:#98a4b3;--rule:#2b3440;
--accent:#3fc48d;--tint:#16322a;--blue:#6da3f5;--amber:#e5a63a;--red:#ef7b6c;--quiet:#748193}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0;overflow-wrap:anywhere}h2{font-size:17px;margin:0 0 14px}h3{font-size:14px;margin:18px 0 6px}
header,section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:22px 24px;margin:0 0 18px}
.sub{color:var(--soft);margin:2px 0 12px;overflow-wrap:anywhere}.verdict{font-size:16px;margin:0 0 16px}
.tiles{display:flex;flex-wrap:wrap;gap:10px}
.tile{flex:1 1 170px;background:var(--bg);border-radius:8px;padding:10px 14px}
.tile b{display:block;font-size:19px;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.scroll{overflow:auto;max-height:620px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{position:sticky;top:0;background:var(--card);text-align:left;color:var(--soft);font-weight:600;white-space:nowrap}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--rule)}td{white-space:nowrap}
td:first-child,th:first-child{padding-left:8px}td:first-child{color:var(--soft)}
tr.best td{background:var(--tint)}tr.bad td{color:var(--soft)}
.badge{margin-left:8px;padding:1px 7px;border-radius:9px;font-size:11.5px;font-weight:600;border:1px solid currentColor;
color:var(--soft)}.badge.diverged,.badge.failed{color:var(--red)}.badge.tied{color:var(--accent)}
.reference b{color:var(--blue)}.wide svg{width:100%}
.whisker{display:block;border-left:1px solid var(--rule);border-right:1px solid var(--rule)}
.whisker line{stroke:var(--quiet);stroke-width:2}.whisker circle{fill:var(--quiet)}
.best .whisker circle{fill:var(--accent)}.best .whisker line{stroke:var(--accent)}
.reference .whisker circle{fill:var(--blue)}.reference .whisker line{stroke:var(--blue)}
.notes{color:var(--soft);font-size:13.5px;padding-left:18px;margin:14px 0 0}
figure{margin:0}figure svg{max-width:100%;height:auto;display:block}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:18px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:14px}
.card{border:1px solid var(--rule);border-radius:8px;padding:10px;font-size:12.5px}
.card.best{border-color:var(--accent)}
.card span:not(.badge){display:block;color:var(--soft)}.card svg{width:100%;margin:6px 0}
figcaption{margin-bottom:2px}.grid{stroke:var(--rule)}.axis,.tick{stroke:var(--quiet)}
.ticklabel{fill:var(--soft);font-size:11px}.label{fill:var(--ink);font-size:12px}.frame{fill:var(--bg);stroke:none}
.line polyline{fill:none;stroke:var(--quiet);stroke-width:1.3;stroke-linejoin:round;opacity:.75}
.line circle{fill:var(--quiet)}.line:hover polyline{stroke:var(--ink);stroke-width:2.5;opacity:1}
.line.best polyline,.line.val polyline{stroke:var(--accent);stroke-width:2.4;opacity:1}
.line.best circle,.line.val circle{fill:var(--accent)}
.line.default polyline{stroke:var(--blue);stroke-width:2.2;opacity:1}.line.default circle{fill:var(--blue)}
.line.base polyline{stroke:var(--amber);stroke-dasharray:5 4;stroke-width:1.6;opacity:1}
.dot circle{fill:var(--quiet);fill-opacity:.85;stroke:var(--card)}.dot line{stroke:var(--quiet);stroke-width:1.5}
.dot.tied circle{fill:var(--accent);fill-opacity:.45}.dot.best circle{fill:var(--accent);fill-opacity:1}
.dot.best line,.dot.tied line{stroke:var(--accent)}.dot:hover circle{stroke:var(--ink);stroke-width:2}
.legend{color:var(--soft);font-size:13px;margin:0 0 12px}.key{margin-right:18px;font-size:13px;color:var(--soft)}
.key::before{content:"";display:inline-block;width:18px;height:3px;border-radius:2px;margin-right:7px;
vertical-align:middle;background:var(--quiet)}
.key.best::before,.key.val::before{background:var(--accent)}.key.default::before{background:var(--blue)}
.key.base::before{background:var(--amber)}
pre{background:var(--bg);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;overflow:auto;margin:0;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
"""
