"""The inspection as one page: no other file, no network, readable without scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from vmq.compare import Change, Comparison
from vmq.findings import Finding
from vmq.report import UNCALIBRATED, Closure, Inspection, said
from vmq.tensors import BINS, Tensor
from vmq.webpage import (
    cell,
    chart,
    esc,
    figure,
    grey,
    jpeg,
    listing,
    page,
    png,
    prose,
    red_and_blue,
    scroll,
    sortable,
    wide,
)


def report_page(seen: Inspection) -> str:
    """The page of an inspection, as HTML."""
    options = seen.setup.get("options") or {}
    name = f"{options.get('bits', '')} · recipe {options.get('recipe', '')} · effort {options.get('effort', '')}"
    sections = [("pictures", "Pictures", _pictures(seen)), ("pipeline", "Pipeline", _pipeline(seen)),
                ("closures", "Closures", _closures(seen)), ("time", "Over time", _time(seen)),
                ("tensors", "Tensors", _tensors(seen)), ("wider", "Wider than nominal", _wider(seen)),
                ("reproduce", "Reproduce", _reproduce(seen))]
    head = f"""<h1>What quantization did to the matte</h1>
<p class="quiet">{esc(name)}</p>
<h2 id="answer">What costs most, and what to try</h2>
{answer(seen.findings)}
{_facts(seen)}"""
    data = json.dumps(seen.to_json()).replace("</", "<\\/")
    return page("vmq report", head, [(i, t, c) for i, t, c in sections if c],
                f'<script type="application/json" id="data">{data}</script>')


def comparison_page(seen: Comparison) -> str:
    """The page of two dumps side by side, as HTML."""
    head = f"""<h1>Two compiles side by side</h1>
<p class="quiet">A: <code>{esc(seen.names[0])}</code><br>B: <code>{esc(seen.names[1])}</code></p>
<h2 id="answer">Which is better</h2>
{answer([seen.verdict])}
{"" if seen.same_clip else "<p>Their frames differ in size: each was measured on its own probe clip.</p>"}"""
    most = max([v for _, *both in seen.passes for v in both if v is not None], default=0.0) or 1.0
    rows = []
    for name, *both in seen.passes:
        if both == [None, None]:
            continue
        bars = "".join(f'<span class="bar{" second" if i else ""}" style="width:{max(0.3, 100 * v / most):.1f}%">'
                       "</span>" for i, v in enumerate(both) if v is not None)
        rows.append(f'<tr><th scope="row" class="name short">{esc(name)}</th>{cell(both[0], 3)}{cell(both[1], 3)}'
                    f'<td class="wide">{bars}</td></tr>')
    table = ('<table><thead><tr><th>pass</th><th class="n">A</th><th class="n">B</th><th><span aria-hidden="true">error'
             f'</span></th></tr></thead><tbody>{"".join(rows)}</tbody></table>')
    passes = ("<p>Error of alpha after each pass that changed one of them: mean |alpha − float alpha| × 10³. A is "
              "blue, B orange.</p>"
              + scroll("Passes", table))
    settings = listing((k, f"{said(a)} → {said(b)}") for k, (a, b) in seen.settings.items()) \
        if seen.settings else "<p>None.</p>"
    lines = [(name, i.loop.closed) for name, i in (("A", seen.first), ("B", seen.second)) if i.loop is not None]
    time = "<p>The error of alpha, frame by frame, on own states.</p>" + chart(lines, first=1)
    sections = [("settings", "Settings that differ", settings), ("pipeline", "Pipeline", passes),
                ("time", "Over time", time),
                ("better", "Better in B", _changes(seen.better)), ("worse", "Worse in B", _changes(seen.worse)),
                ("tensors", "All tensors", _changes(seen.tensors))]
    data = json.dumps(seen.to_json()).replace("</", "<\\/")
    return page("vmq comparison", head, sections, f'<script type="application/json" id="data">{data}</script>')


def _changes(rows: Sequence[Change]) -> str:
    if not rows:
        return "<p>None.</p>"
    body = [f'<tr><th scope="row" class="name" data-v="{esc(c.name)}">{esc(c.name)}</th>'
            f'<td class="n {"better" if c.gain > 0 else "worse" if c.gain < 0 else ""}" data-v="{c.gain:.6g}">'
            f"{c.gain:+.1f}</td>{cell(c.before, 1)}{cell(c.after, 1)}{cell(c.bits[0])}{cell(c.bits[1])}"
            f'<td data-v="{c.kind}">{c.kind}</td></tr>' for c in rows]
    return scroll("Tensors that changed", sortable(
        [("tensor", False), ("change dB", True), ("SQNR A", True), ("SQNR B", True), ("bits A", True),
         ("bits B", True), ("kind", False)], body, 'class="tensors"'), tall=len(body) > 12)


def answer(findings: Iterable[Finding]) -> str:
    """Findings as a list, the gravest first."""
    items = "".join(f'<li><p class="says">{prose(f.says)}</p><p class="hint"><b>Try:</b> {prose(f.hint)}</p></li>'
                    for f in findings)
    return f'<ol class="answer">{items}</ol>' if items else "<p>Nothing is quantized yet.</p>"


# -- sections -------------------------------------------------------------------------------------------


def _facts(seen: Inspection) -> str:
    scores = [p["alpha_MAD"] for p in seen.passes if p["alpha_MAD"] is not None]
    facts = [("alpha MAD to float", f"{scores[-1]:.2f}" if scores else "", "× 10⁻³, first probe frames")]
    if seen.loop is not None:
        facts.append(("over the whole clip", f"{np.mean(seen.loop.closed):.2f}", f"{len(seen.loop.closed)} frames, "
                      "own states"))
        if seen.loop.states:
            facts.append(("through the states", f"{seen.loop.through_all:.0%}", "of the error over the clip"))
    flagged = sum(f.about == "tensor" and "does not fit" in f.says for f in seen.findings)
    facts.append(("grids that do not fit", str(flagged), f"of {sum(t.bits is not None for t in seen.tensors)} tensors"))
    facts.append(("compile time", _clock(sum(p["seconds"] for p in seen.passes)), f"{len(seen.passes)} passes"))
    return '<dl class="facts">' + "".join(
        f"<div><dt>{esc(a)}</dt><dd>{esc(b)}<small>{esc(c)}</small></dd></div>" for a, b, c in facts) + "</dl>"


def _pictures(seen: Inspection) -> str:
    if seen.loop is None:
        return ""
    exact, ours, frames = seen.loop.exact, seen.loop.ours, seen.frames
    worst = int(np.argmax(seen.loop.closed))
    shown = [("Input", f"frame {worst}", jpeg(frames[worst].transpose(1, 2, 0))),
             ("Alpha, float model", "", png(grey(exact[worst]))),
             ("Alpha, quantized model", "", png(grey(ours[worst]))),
             ("Difference, 4 times as strong", "red: the quantized alpha is too high; blue: too low; white: the same",
              png(red_and_blue(ours[worst] - exact[worst], 4.0)))]
    grid = "".join(figure(*s) for s in shown)
    text = (f"<p>Frame {worst} of the probe clip, where the error is largest (MAD {seen.loop.closed[worst]:.2f}; mean "
            f"over the clip {np.mean(seen.loop.closed):.2f}).</p>")
    return f'{text}<div class="pictures">{grid}</div>{_strips(exact, ours, frames)}'


def _strips(exact: NDArray[np.float32], ours: NDArray[np.float32], frames: NDArray[np.uint8]) -> str:
    """One column of pixels over time: of the columns, the one whose alpha flickers most beyond the float model's."""
    if len(exact) < 2:
        return ""
    flicker = np.abs(np.diff(ours, axis=0) - np.diff(exact, axis=0)).mean(axis=(0, 1))
    column = int(np.argmax(flicker))
    strips = [("Input", png(wide(frames[:, :, :, column].transpose(2, 0, 1)))),
              ("Alpha, float model", png(wide(grey(exact[:, :, column]).T))),
              ("Alpha, quantized model", png(wide(grey(ours[:, :, column]).T))),
              ("Difference, 4 times as strong",
               png(wide(red_and_blue((ours - exact)[:, :, column].T, 4.0))))]
    return (f"<h3>Flicker</h3><p>Pixel column {column} in all {len(exact)} frames, side by side from left to right: "
            "the column where the quantized alpha changes most that the float one does not. Smooth bands are calm; "
            'vertical stripes are flicker.</p><div class="strips">'
            + "".join(figure(title, "", data) for title, data in strips) + "</div>")


def _pipeline(seen: Inspection) -> str:
    scores = [p["alpha_MAD"] or 0.0 for p in seen.passes]
    most = max(scores, default=0.0) or 1.0
    rows, before, calibrated = [], None, False
    for entry, score in zip(seen.passes, scores, strict=True):
        known = entry["alpha_MAD"] is not None
        over = before is not None and known and score > 1.05 * before and score - before > 0.05
        bar = f'<span class="bar{" over" if over else ""}" style="width:{max(0.3, 100 * score / most):.1f}%"></span>' \
            if known else ""
        rows.append(f'<tr{"" if entry["modified"] else " class=idle"}><th scope="row" class="name short">'
                    f'{esc(entry["name"])}</th><td class="n">{f"{score:.3f}" if known else ""}</td>'
                    f'<td class="wide">{bar}</td><td class="n">{entry["modified"] or ""}</td>'
                    f'<td class="n">{entry["seconds"]:.1f}</td></tr>')
        calibrated = calibrated or entry["name"] == UNCALIBRATED
        before = score if known and calibrated else before
    return f"""<p>What each pass changed, and the error of alpha after it: mean |alpha − float alpha| × 10³ over the
first probe frames, each model running on its own states. A red bar is a pass that made it worse.</p>
{scroll("Passes", f'''<table><thead><tr><th>pass</th><th class="n">alpha MAD</th>
<th><span aria-hidden="true">error</span></th><th class="n">changes</th><th class="n">seconds</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table>''')}"""


def _closures(seen: Inspection) -> str:
    if not seen.blocks:
        return ""
    blame = {b.name: b for b in seen.blame}
    if blame:
        values = {name: b.cost for name, b in blame.items()}
        unit, what = "", "The bar is its cost: the error of alpha when this closure alone is quantized."
    else:
        values = {b.name: 10 ** (-b.sqnr_db / 20) * 100 for b in seen.blocks if b.sqnr_db is not None}
        unit, what = " %", ("The bar is the error of what it hands on, relative to its values, with all that went "
                            "wrong before it.")
    most = max(values.values(), default=1.0) or 1.0
    items = []
    for block in seen.blocks:
        states = f' <span class="state">↻ {esc(", ".join(block.states))}</span>' if block.states else ""
        value = values.get(block.name)
        meter = "" if value is None else (f'{value:.3g}{unit}<span class="bar" '
                                          f'style="width:{max(0.5, 100 * value / most):.1f}%"></span>')
        about = " · ".join(filter(None, (f"{len(block.layers)} layers" if len(block.layers) != 1 else "1 layer",
                                         block.bits, "×".join(map(str, block.shape)))))
        items.append(f'<li><div class="who"><span>{esc(block.name)}{states} <span class="quiet">{esc(block.label)}'
                     f'</span></span><small>{esc(about)}</small></div><div class="meter">{meter}</div></li>')
    heads: list[tuple[str, bool | None]] = [("closure", False)]
    if blame:
        heads += [("gain", True), ("cost", True)]
    heads += [("SQNR dB", True), ("bits", False), ("layers", True)]
    chosen = {c["name"]: c for c in seen.chosen.get("closures", [])}
    widths = list(dict.fromkeys(w for c in chosen.values() for w, moved in c["sensitivity"].items() if moved))
    if chosen:
        heads += [("chosen", False), *((f"at {w}", True) for w in widths)]
    rows = []
    for block in seen.blocks:
        cells = [cell(blame[block.name].gain, 3), cell(blame[block.name].cost, 3)] if blame else []
        cells += [cell(block.sqnr_db, 1), f'<td data-v="{esc(block.bits)}">{esc(block.bits)}</td>',
                  cell(len(block.layers))]
        if chosen:
            mine = chosen.get(block.name, {"bits": "", "sensitivity": {}})
            cells += [f'<td data-v="{mine["bits"]}">{mine["bits"]}</td>',
                      *(cell(mine["sensitivity"].get(w), 3) for w in widths)]
        rows.append(f'<tr><th scope="row" data-v="{esc(block.name)}">{esc(block.title)}</th>{"".join(cells)}</tr>')
    table = scroll("Closures in numbers", sortable(heads, rows))
    note = ("<p>Gain: by how much the error of alpha falls when this closure alone stays in float. Cost: the error "
            "when it alone is quantized; costs are no shares of the whole, because later layers have learned to make "
            "up for earlier ones.</p>") if blame else (
            "<p>With <code>vmq inspect DUMP --blame --html FILE</code> this page also says what each closure costs "
            "alpha.</p>")
    if chosen:
        note += (f"<p>Chosen: the widths that the budget, {esc(seen.chosen['budget'])}, is best spent on. At W4A8 "
                 "and the like: how far the closure alone at these widths moved alpha from that of W8A8, before "
                 "learning.</p>")
    inner = ""
    if seen.tensor_blame:
        first = next(b.title for b in seen.blocks if b.name == seen.blame[0].name)
        body = [f'<tr><th scope="row" class="name" data-v="{esc(b.name)}">{esc(b.name)}</th>{cell(b.gain, 3)}'
                f"{cell(b.cost, 3)}</tr>" for b in seen.tensor_blame]
        inner = f"<h3>The tensors of {esc(first)}</h3>" + scroll("Tensors of the worst closure", sortable(
            [("tensor", False), ("gain", True), ("cost", True)], body), tall=len(body) > 16)
    if seen.refit:
        body = [f'<tr><th scope="row" class="name" data-v="{esc(name)}">{esc(name)}</th>{cell(gain, 3)}</tr>'
                for name, gain in seen.refit.items()]
        inner += ("<h3>Grids that do not fit</h3><p>Gain: by how much the error of alpha falls when this tensor alone "
                  "gets the step that fits its values best, with as many levels.</p>") + scroll(
            "Grids that do not fit", sortable([("tensor", False), ("gain", True)], body))
    return f"""<p>The blocks of reconstruction in topological order: none cuts through a state update. Lines are what
they read from each other; a ring is a recurrent state that comes back with the next frame. {what}</p>
<div class="chain">{_wires(seen.blocks)}<ol>{"".join(items)}</ol></div>
<h3>In numbers</h3>{note}{table}{inner}"""


def _wires(blocks: Sequence[Closure]) -> str:
    """The graph of the closures: a spine, arcs for what skips ahead, rings for states."""
    height, spine = 52, 50
    place = {b.name: i for i, b in enumerate(blocks)}
    parts = []
    for block in blocks:
        end = place[block.name] * height + height / 2
        for source in block.reads:
            start = place[source] * height + height / 2
            if place[block.name] - place[source] == 1:
                parts.append(f'<path class="wire" d="M{spine} {start + 7}V{end - 7}"/>')
            else:
                reach = 12 + 44 * ((place[block.name] - place[source]) / len(blocks)) ** 0.5
                parts.append(f'<path class="wire" d="M{spine - 7} {start}C{spine - reach:.0f} {start} '
                             f'{spine - reach:.0f} {end} {spine - 7} {end}"/>')
    for block in blocks:
        y = place[block.name] * height + height / 2
        if block.states:
            parts.append(f'<path class="wire loop" d="M{spine + 4} {y - 6}C{spine + 20} {y - 18} {spine + 20} {y + 18} '
                         f'{spine + 4} {y + 6}"/>')
        parts.append(f'<circle class="knot{" loop" if block.states else ""}" cx="{spine}" cy="{y}" r="6"/>')
    names = "; ".join(f"{b.name} reads {', '.join(b.reads) or 'the input'}" for b in blocks)
    return (f'<svg viewBox="0 0 72 {height * len(blocks)}" preserveAspectRatio="none" role="img" '
            f'aria-label="{esc(names)}">{"".join(parts)}</svg>')


def _time(seen: Inspection) -> str:
    loop = seen.loop
    if loop is None:
        return ""
    series = [("own states (closed loop)", loop.closed)]
    if loop.states:
        series.append(("all states from the float model (open loop)", loop.open))
        series += [(f"state {name} from the float model", errors) for name, errors in loop.states.items()]
    text = "The error of alpha, frame by frame."
    shares = ""
    if loop.states:
        text += (" If a line is far below the first, that much of the error came through the state: it is fed the "
                 "float model's value before every frame.")
        rows = "".join(
            f'<tr><th scope="row">{esc(name)}</th><td class="n">{share:.1%}</td><td class="wide"><span class="bar" '
            f'style="width:{max(0.0, min(100.0, 100 * share)):.1f}%"></span></td></tr>'
            for name, share in [*loop.through.items(), ("all together", loop.through_all)])
        shares = "<h3>What comes through the states</h3><p>Share of the mean error that goes when a state is " \
            "exact. A share below 0 says that the quantized model has learned to live with its own.</p>" + scroll(
                "Error through states", '<table><thead><tr><th>state</th><th class="n">share</th>'
                f'<th><span aria-hidden="true">of the error</span></th></tr></thead><tbody>{rows}</tbody></table>')
    heads = [("frame", True), *((name, True) for name, _ in series)]
    body = [f'<tr><td class="n" data-v="{t}">{t}</td>{"".join(cell(errors[t], 3) for _, errors in series)}</tr>'
            for t in range(len(loop.closed))]
    table = scroll("Error by frame", sortable(heads, body), tall=True)
    numbers = f"<details><summary>The numbers</summary>{table}</details>"
    return f"<p>{text}</p>{chart(series)}{numbers}{shares}"


def _tensors(seen: Inspection) -> str:
    if not seen.tensors:
        return ""
    titles = {b.name: b.title for b in seen.blocks}
    heads = [("tensor", False), ("on its grid", None), ("closure", False), ("kind", False), ("bits", True),
             ("SQNR dB", True), ("own dB", True), ("misfit dB", True), ("clipped", True), ("levels", True),
             ("flips", True)]
    flagged = {f.name for f in seen.findings if f.about == "tensor"}
    rows = [_tensor_row(t, titles.get(t.closure, t.closure), t.name in flagged) for t in seen.tensors]
    choices = "".join(f'<option value="{esc(b.name)}">{esc(b.title)}</option>' for b in seen.blocks)
    return f"""<p>SQNR: signal to noise up to here, with everything before it. Own: what this tensor's quantizer alone
adds. Misfit: how far its noise is above what the best range with as many levels would give (0 is perfect; 18 dB is a
scale 8 times too large). Flips: weights whose integer is not the nearest one, because rounding was learned. The
histogram shows values over the grid (shaded); red bars lie beyond its ends.</p>
<form class="filters" id="filters"><label>Name contains<input name="text" type="search" autocomplete="off"></label>
<label>Kind<select name="kind"><option value="">all</option><option>activation</option><option>weight</option></select>
</label><label>Closure<select name="closure"><option value="">all</option>{choices}</select></label>
<output id="shown" aria-live="polite">{len(rows)} tensors</output></form>
{scroll("Tensors", sortable(heads, rows, 'id="tensor-table" class="tensors"'), tall=True)}"""


def _tensor_row(t: Tensor, closure: str, flagged: bool) -> str:
    share = "" if t.used is None or t.levels is None else f"{t.used}/{t.levels}"
    cells = [f"<td>{_histogram(t)}</td>",
             f'<td data-v="{esc(t.closure)}" title="{esc(closure)}">{esc(t.closure)}</td>',
             f'<td data-v="{t.kind}">{t.kind}</td>', cell(t.bits), cell(t.sqnr_db, 1), cell(t.own_db, 1),
             cell(t.misfit_db, 1), cell(t.clipped, 2, percent=True),
             f'<td class="n" data-v="{"" if t.used is None or not t.levels else t.used / t.levels}">{share}</td>',
             cell(t.flips, 1, percent=True)]
    return (f'<tr data-text="{esc(t.name.lower())} {esc(closure.lower())}" data-kind="{t.kind}" '
            f'data-closure="{esc(t.closure)}"{" class=flag" if flagged else ""}>'
            f'<th scope="row" class="name" data-v="{esc(t.name)}">{esc(t.name)}</th>{"".join(cells)}</tr>')


def _histogram(t: Tensor) -> str:
    if not t.histogram or t.low is None or t.high is None:
        return '<span class="quiet">float</span>'
    tallest = max(t.histogram) or 1.0
    edge = BINS // 6
    bars = {True: "", False: ""}
    for i, share in enumerate(t.histogram):
        if share > 0.0:
            tall = max(1.0, 30.0 * (share / tallest) ** 0.5)           # by the root: tails show
            bars[edge <= i < BINS - edge] += f"M{3 * i} 32v-{tall:.0f}h3v{tall:.0f}z"
    says = f"grid {t.low:.3g} to {t.high:.3g}, values {t.smallest:.3g} to {t.largest:.3g}"
    return (f'<svg class="histogram" viewBox="0 0 {3 * BINS} 32" preserveAspectRatio="none" role="img" '
            f'aria-label="{says}"><title>{says}</title>'
            f'<path class="grid" d="M{3 * edge} 0H{3 * (BINS - edge)}V32H{3 * edge}z"/>'
            f'<path class="bars" d="{bars[True]}"/><path class="out" d="{bars[False]}"/></svg>')


def _wider(seen: Inspection) -> str:
    if not seen.setup.get("options"):
        return ""
    if not seen.wider:
        return "<p>Nothing: all layers have the bits that were asked for.</p>"
    items = "".join(f'<tr><th scope="row" class="name">{esc(name)}</th><td>{esc(bits)}</td></tr>'
                    for name, bits in seen.wider.items())
    table = f"<table><thead><tr><th>what</th><th>bits</th></tr></thead><tbody>{items}</tbody></table>"
    return f"""<p>What has more bits than <code>--bits</code> asked for. <code>--keep</code> changes it.</p>
{scroll("Wider than nominal", table, tall=len(seen.wider) > 12)}"""


def _reproduce(seen: Inspection) -> str:
    setup = seen.setup
    clips = [(c["name"], f"{c['frames']} frames") for c in setup.get("clips") or []]
    notes = "".join(f"<li>{esc(n)}</li>" for n in seen.notes)
    return f"""<p>This command made the dump:</p><pre><code>{esc(setup.get("command") or "(not known)")}</code></pre>
<div class="pair"><div><h3>Settings</h3>{listing((setup.get("options") or {}).items())}</div>
<div><h3>Versions</h3>{listing((setup.get("versions") or {}).items())}</div></div>
<details><summary>Calibration clips ({len(clips)})</summary>{listing(clips)}</details>
{f"<details><summary>Notes of the passes ({len(seen.notes)})</summary><ul>{notes}</ul></details>" if notes else ""}"""


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
