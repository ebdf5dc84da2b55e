"""The look of the HTML report: light and dark, phone, desk and paper."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{--page:#f6f7f9;--card:#fff;--ink:#161d29;--soft:#5a6577;--line:#dfe3ea;
--PASS:#177245;--AMBIGUOUS:#8a5a00;--FAIL:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#10161f;--card:#19212d;--ink:#e8ecf3;--soft:#9aa6b8;
--line:#2b3646;--PASS:#58c48c;--AMBIGUOUS:#e5ae45;--FAIL:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:clamp(1.4rem,4.5vw,2rem);line-height:1.2;margin:.1em 0 .5em;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2em 0 .8em}h3{font-size:1rem;margin:0}
p{margin:.3em 0}ul{margin:.6em 0;padding-left:1.2em}
.PASS{--mark:var(--PASS)}.AMBIGUOUS{--mark:var(--AMBIGUOUS)}.FAIL{--mark:var(--FAIL)}
header,.stages li,article,.settings{background:var(--card);border:1px solid var(--line);border-radius:12px}
header{padding:20px;border-top:5px solid var(--mark)}
.kicker{color:var(--soft);font-size:.85rem;margin:0}
.badge{color:var(--mark);border:1.5px solid var(--mark);border-radius:99px;padding:1px 10px;font-size:.8rem;
font-weight:700;white-space:nowrap}
.verdict .badge{font-size:.95rem;margin-right:.5em}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:14px;margin:18px 0 0}
.figures div{border-top:1px solid var(--line);padding-top:10px}
.figures dd{margin:0;font-size:1.5rem;font-weight:650;font-variant-numeric:tabular-nums}
.figures div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
dt{color:var(--soft);font-size:.85rem}
.stages{list-style:none;margin:0;padding:0;display:grid;gap:12px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.stages li{padding:14px 16px}
.line{display:flex;justify-content:space-between;align-items:center;gap:8px}
.bar{height:6px;border-radius:3px;background:var(--line);margin:10px 0 8px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--mark)}
.numbers{font-size:.85rem;font-variant-numeric:tabular-nums}
.note,.reason{font-size:.83rem;color:var(--soft);overflow-wrap:anywhere}
.reason{border-top:1px dashed var(--line);padding-top:.4em;margin-top:.5em}
section>.note{margin:-.4em 0 .9em}
.cases{columns:330px;column-gap:16px}
article{padding:14px;overflow:hidden;break-inside:avoid;margin:0 0 16px}
.shown{display:flex;gap:10px;align-items:start}
figure{margin:0 0 10px;flex:1 1 0;min-width:0}
figcaption{font-size:.8rem;color:var(--soft);margin-top:4px}
img{display:block;max-width:100%;max-height:430px;width:auto;height:auto;border-radius:6px}
.qa{display:grid;grid-template-columns:auto 1fr;gap:4px 12px;margin:0;align-items:baseline}
.qa dd,.settings dd{margin:0;overflow-wrap:anywhere}
.settings{display:grid;grid-template-columns:minmax(7em,auto) 1fr;gap:6px 16px;margin:0;padding:16px;
align-items:baseline}
@media print{@page{margin:14mm}:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;
--PASS:#177245;--AMBIGUOUS:#8a5a00;--FAIL:#b3261e}
body{font-size:10.5pt}main{max-width:none;padding:0}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.stages{grid-template-columns:1fr 1fr}.cases{columns:2}
.stages li,article,header{break-inside:avoid}h2{break-after:avoid}}
"""
