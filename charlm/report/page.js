"use strict";
// Draws the figures of the page with Plotly, in the colours of the reader's theme, and again when theme or width change.
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

// A copy of `value`, the option `key` of a figure, with the names of CSS variables replaced by their values.
function painted(value, key) {
  if (Array.isArray(value)) return value.map((each) => painted(each, key));
  if (value !== null && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, painted(each, name)]));
  if (key === "color") return value.replace(/var\((--\w+)\)/, (_, name) => css(name));
  if (key === "colorscale" && value === "sequential") return [[0, css("--paper")], [0.5, css("--middle")], [1, css("--high")]];
  if (key === "colorscale") return [[0, css("--low")], [0.5, css("--paper")], [1, css("--warm")]];
  return value;
}

function draw(plot, most) {
  const { data, layout } = painted(figures[plot.id]);
  const width = Math.min(most || Infinity, plot.clientWidth);
  const line = { gridcolor: css("--grid"), linecolor: css("--grid"), zerolinecolor: css("--faint"), zeroline: false };
  const names = data.map((trace) => trace.name || "").filter((name) => name);
  const widths = names.map((name) => name.length * 7.2 + 50); // of the entries of the legend
  const inside = width - 74;
  const columns = Math.max(1, Math.floor(inside / Math.max(...widths)));
  const fits = widths.reduce((sum, each) => sum + each, 0) <= inside;
  const rows = names.length < 2 ? 0 : fits ? 1 : Math.ceil(names.length / columns);
  const height = layout.square ? width : Math.max(280, Math.min(420, 0.45 * width));
  const right = layout.yaxis2 ? 64 : data[0].type === "heatmap" ? 50 : 18;
  delete layout.square;
  for (const trace of data.filter((each) => each.type === "heatmap")) {
    const [after, next] = [layout.yaxis.ticktext, layout.xaxis.ticktext];
    trace.text = trace.z.map((row, i) => row.map((_, j) => `${next[j]} after ${after[i]}`));
    trace.colorbar = { thickness: 8, xpad: 4, outlinewidth: 0, tickfont: { size: 10 } };
    const step = Math.ceil((9 * after.length) / (width - 110)); // ticks that do not touch each other
    for (const ticks of [layout.xaxis, layout.yaxis]) {
      for (const key of ["tickvals", "ticktext"]) ticks[key] = ticks[key].filter((_, index) => index % step === 0);
      Object.assign(ticks, { tickfont: { size: 9 }, showgrid: false, tickangle: 0, ticks: "" });
    }
  }
  for (const name of Object.keys(layout)) if (/axis/.test(name)) layout[name] = { ...line, ...layout[name] };
  Object.assign(layout, {
    width,
    height: height + 20 * rows,
    autosize: false,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--ink") },
    margin: { l: 56, r: right, t: 10, b: 46 + 20 * rows }, // Plotly's automatic margins do not always settle
    hovermode: "closest",
    hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--faint"), font: { color: css("--ink") }, namelength: -1 },
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    showlegend: names.length > 1,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  });
  return Plotly.react(plot, data, layout, { displayModeBar: false, responsive: false });
}

const drawAll = (most) => Promise.all([...document.querySelectorAll(".plot")].map((plot) => draw(plot, most)));
let waiting = 0;
function redraw() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => drawAll());
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("resize", redraw);
addEventListener("beforeprint", () => {
  root.dataset.theme = "light";
  drawAll(660);
});
addEventListener("afterprint", () => {
  delete root.dataset.theme;
  redraw();
});
drawAll().then(() => (root.dataset.drawn = "true"));
