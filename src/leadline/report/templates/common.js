"use strict";
// Shared by both report pages: markers and legends, dot plots, redrawing, sortable and filterable tables.
// Strings from models and files are only ever inserted as text nodes, never parsed as HTML.

const SHAPES = {
  circle: "M6 1.2a4.800 4.800 0 1 0 .01 0z", square: "M1.700 1.700h8.600v8.600h-8.600z",
  diamond: "M6 .3 11.700 6 6 11.700 .3 6z", "triangle-up": "M6 .8 11.500 10.600H.5z",
  "triangle-down": "M6 11.200 11.500 1.400H.5z", cross: "M4 .8h4V4h3.200v4H8v3.200H4V8H.8V4H4z",
  x: "m3 .6 3 3 3-3L11.400 3l-3 3 3 3L9 11.400l-3-3-3 3L.6 9l3-3-3-3z",
};
const SYMBOLS = Object.keys(SHAPES);
const NARROW = 560; // pixels below which a row's name is above it
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const make = (tag, attributes = {}, ...children) => {
  const svg = tag === "svg" || tag === "path";
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
// Plotly interprets some HTML tags and entities in labels; escape them, so that text is shown as it is.
const literal = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, " ");
const truncate = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const percent = (share) => {
  const value = 100 * share;
  return (value > 0 && value < 1) || (value > 99 && value < 100) ? value.toFixed(1) + "%" : value.toFixed(0) + "%";
};
// A point [value, low, high, n] in words; its interval may not be known.
const withInterval = ([value, low, high, n], say) =>
  say(value) + (low === null || high === null ? "" : ` [${say(low)}, ${say(high)}]`) + (n ? `, n = ${n}` : "");
const fontOf = () => ({ family: getComputedStyle(document.body).fontFamily, size: 13, color: color("--soft") });
const hoverLabel = (font) => ({ bgcolor: color("--card"), bordercolor: color("--line"), font: { ...font, color: color("--ink") }, align: "left" });
const STILL = { displayModeBar: false, staticPlot: false, scrollZoom: false };

// Add a legend with a checkbox for each series; calls `draw` when one changes. Returns each series' marker
// (`look`) and a function that lists the indices of the visible series (`shown`).
function legend(controls, series, draw) {
  const look = series.map(({ tone }) => ({ symbol: SYMBOLS[tone % SYMBOLS.length], color: `--s${tone % 8}` }));
  const boxes = series.map((one, i) => {
    const path = make("path", { d: SHAPES[look[i].symbol], fill: `var(${look[i].color})` });
    const box = make("input", { type: "checkbox" });
    box.checked = one.shown;
    box.addEventListener("change", draw);
    const label = make("label", {}, make("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" }, path), make("span", {}, one.name));
    if (series.length > 2) label.prepend(box);
    controls.append(label);
    return box;
  });
  return { look, shown: () => series.map((_, i) => i).filter((i) => boxes[i].checked) };
}

function dotPlot(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const chart = figure.querySelector(".chart");
  const controls = figure.querySelector(".controls");
  let view = 0;
  if (data.views.length > 1) {
    const select = make("select", { "aria-label": "Dataset" });
    data.views.forEach((v, i) => select.append(make("option", { value: i }, v.name)));
    select.addEventListener("change", () => { view = Number(select.value); draw(); });
    controls.append(select);
  }
  const { look, shown: picked } = legend(controls, data.series, () => draw());

  function draw() {
    const width = chart.clientWidth, narrow = width < NARROW;
    const shown = picked();
    const lane = 9; // vertical pixels between the series of one row
    const row = Math.max(26, 14 + lane * Math.max(1, shown.length)) + (narrow ? 18 : 0);
    const shift = narrow ? 9 / row : 0;
    const traces = shown.map((i, k) => {
      const at = data.rows.map((_, r) => r).filter((r) => data.views[view].points[i][r]);
      const points = at.map((r) => data.views[view].points[i][r]);
      return {
        type: "scatter", mode: "markers", name: literal(data.series[i].name), hoverinfo: "text",
        x: points.map((p) => p[0]), y: at.map((r) => r + shift + ((k - (shown.length - 1) / 2) * lane) / row),
        text: points.map((p, j) => `<b>${literal(data.rows[at[j]])}</b><br>${literal(data.series[i].name)}<br>${withInterval(p, percent)}`),
        error_x: {
          type: "data", symmetric: false, array: points.map((p) => (p[2] ?? p[0]) - p[0]), arrayminus: points.map((p) => p[0] - (p[1] ?? p[0])),
          color: color(look[i].color), thickness: 1.6, width: 0,
        },
        marker: { color: color(look[i].color), symbol: look[i].symbol, size: 8.5, line: { color: color("--paper"), width: 1 } },
      };
    });
    const names = data.rows.map((name, r) => ({
      text: literal(truncate(name, 52)), x: 0, y: r - 0.5 + 11 / row, xref: "x", yref: "y", xanchor: "left", showarrow: false,
      font: { size: 12.5, color: color("--ink") },
    }));
    const font = fontOf();
    const layout = {
      width, height: data.rows.length * row + 66, margin: { l: narrow ? 16 : 10, r: 22, t: 30, b: 30, pad: 6 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font, showlegend: false, dragmode: false,
      annotations: narrow ? names : [],
      hoverlabel: hoverLabel(font),
      xaxis: {
        range: [-0.012, 1.012], tickvals: narrow ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1], tickformat: ".0%", gridcolor: color("--grid"),
        zeroline: false, fixedrange: true, side: "top",
      },
      yaxis: {
        range: [data.rows.length - 0.4, -0.6], tickvals: data.rows.map((_, r) => r + shift), ticktext: data.rows.map((n) => literal(truncate(n, 34))),
        showticklabels: !narrow, automargin: !narrow, tickfont: { size: 13, color: color("--ink") }, zeroline: false, fixedrange: true,
        gridcolor: color("--grid"), griddash: "dot",
      },
    };
    Plotly.react(chart, traces, layout, STILL);
  }
  draw();
  return draw;
}

const plots = []; // the redraw function of each plot
const redraw = () => plots.forEach((draw) => draw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
matchMedia("print").addEventListener("change", redraw);
let resized = 0, last = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === last) return; // a phone's address bar changes the height only
  last = innerWidth;
  clearTimeout(resized);
  resized = setTimeout(redraw, 120);
});

function dataTable(table) {
  const rows = [...table.tBodies[0].rows];
  const heads = [...table.tHead.rows[0].cells];
  const section = table.closest(".numbers, section");
  const tools = section.querySelector(".tools"), more = section.querySelector(".more");
  let limit = Number(table.dataset.show) || Infinity, filter = "";

  const value = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent.trim();
    const number = Number(text.replace(/,/g, ""));
    return text === "" || text === "–" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
  };
  const show = () => {
    let matches = 0;
    for (const row of rows) {
      const match = !filter || row.textContent.toLowerCase().includes(filter);
      matches += match;
      row.hidden = !match || matches > limit;
    }
    if (tools) tools.querySelector(".found").textContent = `${matches.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    if (more) {
      more.hidden = matches <= limit;
      more.textContent = `Show all ${matches.toLocaleString("en")} rows`;
    }
  };
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") !== "descending" && !head.classList.contains("word")
        || head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const keys = new Map(rows.map((row) => [row, value(row, column)]));
      rows.sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (x === null || y === null) return (x === null) - (y === null); // rows without a value come last
        return (x < y ? -1 : x > y ? 1 : 0) * (descending ? -1 : 1);
      });
      table.tBodies[0].append(...rows);
      show();
    });
  });
  if (tools && rows.length > 12) {
    tools.hidden = false;
    tools.querySelector("input").addEventListener("input", (event) => { filter = event.target.value.trim().toLowerCase(); show(); });
  }
  if (more) more.addEventListener("click", () => { limit = Infinity; show(); });
  show();
}
document.querySelectorAll("table.data:not(.plain)").forEach(dataTable);
addEventListener("beforeprint", () => document.querySelectorAll(".more").forEach((button) => button.click()));
