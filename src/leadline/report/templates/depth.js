// The depth page: curves with intervals as bands, in panels that share a legend and selectors, and the
// dot plots of common.js. The data of a plot are described in report/depth/plots.py.

const number = (value) => {
  const size = Math.abs(value);
  if (size >= 1e9 || (size > 0 && size < 0.001)) return value.toExponential(1);
  return size >= 99.5 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(2)));
};
// The scale log2(1 + dose) spaces doses such as 0, 1, 2, 5, 10, 100 about evenly.
const logScale = (x) => Math.log2(1 + x);
const linearScale = (x) => x;

function curves(plot) {
  const data = JSON.parse(plot.querySelector("script").textContent);
  const charts = plot.querySelector(".chart");
  const controls = plot.querySelector(".controls");
  const chosen = data.selects.map(() => 0); // by select, the index of the choice
  data.selects.forEach((select, at) => {
    const numeric = select.choices.length > 2 && select.choices.every((choice) => /^\d+$/.test(choice));
    const output = make("output", {}, select.choices[0]);
    const input = numeric
      ? make("input", { type: "range", min: 0, max: select.choices.length - 1, value: 0, "aria-label": select.name, "aria-valuetext": select.choices[0] })
      : make("select", { "aria-label": select.name });
    if (!numeric) select.choices.forEach((choice, i) => input.append(make("option", { value: i }, choice)));
    input.addEventListener("input", () => {
      chosen[at] = Number(input.value);
      output.textContent = select.choices[chosen[at]];
      if (numeric) input.setAttribute("aria-valuetext", output.textContent);
      draw();
    });
    if (select.choices.length > 1) controls.append(make("label", { class: "choice" }, select.name + " ", input, ...(numeric ? [output] : [])));
  });
  const { look, shown } = legend(controls, data.series, () => draw());
  charts.style.setProperty("--columns", Math.min(data.columns || data.panels.length, 4));
  const panels = data.panels.map((panel) => {
    const title = make("p", { class: "panel" }, panel.title), drawing = make("div", {});
    charts.append(make("div", {}, title, drawing));
    return { ...panel, drawing };
  });

  function draw() {
    const view = chosen.reduce((at, choice, i) => at * data.selects[i].choices.length + choice, 0);
    const visible = new Set(shown());
    for (const panel of panels) drawPanel(panel, panel.views[view], visible);
  }

  function drawPanel(panel, { lines, marks }, visible) {
    const rate = panel.unit === "percent", format = rate ? percent : number;
    const log = panel.log ?? data.log, scale = log ? logScale : linearScale, xTitle = panel.x ?? data.x;
    const width = panel.drawing.clientWidth, height = width > 520 ? 360 : 230;
    const drawn = lines.filter((line) => visible.has(line.s));
    const order = new Map([...new Set(drawn.map((line) => line.s))].map((s, i) => [s, i]));
    const xs = [...new Set(panel.views.flatMap((v) => v.lines.flatMap((line) => line.points.map((p) => p[0]))))].sort((a, b) => a - b);
    const single = xs.length === 1; // a single dose: markers side by side, with error bars
    const traces = [];
    for (const line of drawn) {
      for (const band of bands(line.points)) {
        traces.push({
          type: "scatter", mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: color(look[line.s].color), opacity: Math.min(0.16, 0.45 / order.size), hoverinfo: "skip",
          x: [...band.map((p) => scale(p[0])), ...band.map((p) => scale(p[0])).reverse()], y: [...band.map((p) => p[3]), ...band.map((p) => p[2]).reverse()],
        });
      }
    }
    for (const line of drawn) {
      const nth = order.get(line.s), tone = color(look[line.s].color), dashed = Boolean(line.dash), many = line.points.length > 24;
      const width = Math.max(1.6, 3.2 - 0.5 * nth); // thinner on top, so that lines that coincide are all visible
      traces.push({
        type: "scatter", mode: dashed ? "lines" : "lines+markers", name: literal(data.series[line.s].name), hoverinfo: "text",
        x: line.points.map((p) => scale(p[0]) + (single ? (nth - (order.size - 1) / 2) * 0.12 : 0)), y: line.points.map((p) => p[1]),
        text: line.points.map((p) => `<b>${literal(data.series[line.s].name)}</b>${dashed ? "<br>" + literal(line.dash) : ""}<br>${literal(xTitle)}: ${numberX(p[0])}<br>${withInterval(p.slice(1), format)}`),
        line: { color: tone, width, dash: dashed ? "dot" : "solid" },
        error_y: single && {
          type: "data", symmetric: false, array: line.points.map((p) => (p[3] ?? p[1]) - p[1]), arrayminus: line.points.map((p) => p[1] - (p[2] ?? p[1])),
          color: tone, thickness: 1.6, width: 0,
        },
        marker: { color: tone, symbol: look[line.s].symbol, size: many ? 5 : Math.max(8, 10.5 - 1.2 * nth), line: { color: color("--paper"), width: many ? 0 : 1 } },
      });
    }
    const d50s = (marks || []).filter((mark) => visible.has(mark.s));
    for (const mark of d50s) {
      const low = scale(mark.low ?? xs[0]), high = scale(mark.high ?? xs[xs.length - 1]), x = scale(mark.x), tone = color(look[mark.s].color);
      const ends = mark.low === null && mark.high === null ? "" : ` [${mark.low === null ? "below " + xs[0] : number(mark.low)}, ${mark.high === null ? "above " + xs[xs.length - 1] : number(mark.high)}]`;
      traces.push({
        type: "scatter", mode: "markers", x: [x], y: [0.5], hoverinfo: "text", text: `<b>${literal(data.series[mark.s].name)}</b><br>D50: ${number(mark.x)}${ends}`,
        marker: { symbol: "diamond-tall", size: width > 400 ? 15 : 11, color: color("--paper"), line: { color: tone, width: 2 } },
        error_x: { type: "data", symmetric: false, array: [high - x], arrayminus: [x - low], color: tone, thickness: 2, width: 4 },
      });
    }
    const font = fontOf();
    const top = rate ? 1 : panel.top ?? Math.max(0, ...lines.flatMap((line) => line.points.map((p) => p[3] ?? p[1])));
    const first = scale(xs[0] ?? 0), last = scale(xs[xs.length - 1] ?? 1), pad = single ? 1 : (last - first) * 0.03;
    const labels = [];
    const shapes = d50s.length ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0.5, y1: 0.5, line: { color: color("--dim"), width: 1, dash: "dot" } }] : [];
    if (panel.shade && last > panel.shade) {
      shapes.push({ type: "rect", xref: "x", yref: "paper", x0: first - pad, x1: panel.shade - 0.5, y0: 0, y1: 1, fillcolor: color("--line"), opacity: 0.45, line: { width: 0 }, layer: "below" });
      labels.push({ x: first, text: `the first ${panel.shade}` });
    }
    if (panel.control && xs[0] === 0) {
      shapes.push({ type: "line", yref: "paper", x0: 0, x1: 0, y0: 0, y1: 1, line: { color: color("--dim"), width: 1, dash: "dash" }, layer: "below" });
      labels.push({ x: 0, text: "control: the initial suffix" });
    }
    const layout = {
      width, height, margin: { l: 46, r: 12, t: labels.length ? 22 : 8, b: 44 }, font, showlegend: false, dragmode: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: hoverLabel(font), shapes,
      annotations: labels.map(({ x, text }) => ({ x, y: 1, xref: "x", yref: "paper", text, showarrow: false, xanchor: "left", yanchor: "bottom", font: { size: 11.5, color: color("--soft") } })),
      xaxis: {
        range: [first - pad, last + pad], title: { text: literal(xTitle), font: { size: 12.5 }, standoff: 8 }, fixedrange: true, zeroline: false, gridcolor: color("--grid"),
        ...ticks(xs, scale, log, width - 58),
      },
      yaxis: {
        range: rate ? [-0.04, 1.04] : [-0.04 * top, 1.06 * (top || 1)], ...(rate ? { tickvals: [0, 0.25, 0.5, 0.75, 1], tickformat: ".0%" } : { nticks: 6 }),
        fixedrange: true, zeroline: false, gridcolor: color("--grid"),
      },
    };
    Plotly.react(panel.drawing, traces, layout, STILL);
  }
  draw();
  return draw;
}

const numberX = (x) => (Number.isInteger(x) ? x.toLocaleString("en") : String(x));

// Runs of consecutive points whose intervals are known, each drawn as one band.
function bands(points) {
  const runs = [[]];
  for (const p of points) {
    if (p[2] === null || p[3] === null) runs.push([]);
    else runs[runs.length - 1].push(p);
  }
  return runs.filter((run) => run.length > 1);
}

// Ticks at the doses that were tried, as many as fit into `width` pixels; plotly's own ticks where there
// are many values on a linear scale.
function ticks(xs, scale, log, width) {
  if (!log && xs.length > 12) return { tickformat: ",d" };
  const kept = [], pixels = width / (scale(xs[xs.length - 1]) - scale(xs[0]) || 1);
  const last = xs[xs.length - 1];
  for (const x of xs) {
    const room = (y) => (scale(x) - scale(y)) * pixels >= 6 + 4 * (numberX(x).length + numberX(y).length);
    if (kept.length && !room(kept[kept.length - 1])) {
      if (x !== last || kept.length < 2) continue;
      kept.pop();
    }
    kept.push(x);
  }
  return { tickvals: kept.map(scale), ticktext: kept.map(numberX) };
}

plots.push(...[...document.querySelectorAll(".plot")].map((plot) => (plot.classList.contains("curves") ? curves(plot) : dotPlot(plot))));
