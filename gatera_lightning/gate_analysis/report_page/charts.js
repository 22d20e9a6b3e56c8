"use strict";

// Colors, HTML and SVG elements, and the charts of the gate report.

const COLORMAP = [ // cividis
  [0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115],
  [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56],
];
const SERIES_COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999"];
const SERIES_DASHES = ["none", "6 3", "2 2", "8 2 2 2"];

const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const unique = values => [...new Set(values)];
const formatGate = g => g === null || g === undefined ? "–" : g.toFixed(3);
const formatShare = share => share === undefined ? "–" : (100 * share).toFixed(1) + " %";

function gateRgb(g) {
  const place = Math.min(Math.max(g, 0), 1) * (COLORMAP.length - 1);
  const low = Math.min(Math.floor(place), COLORMAP.length - 2);
  return COLORMAP[low].map((value, i) => Math.round(value + (place - low) * (COLORMAP[low + 1][i] - value)));
}
const gateColor = g => `rgb(${gateRgb(g).join(",")})`;
function textColorOn(g) {
  const [red, green, blue] = gateRgb(g);
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

// An HTML element. Children that are strings become text, so nothing in them is interpreted as HTML.
function element(tag, settings = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style" || name === "role" || !(name in node)) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

function svgElement(tag, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

function legend() {
  const colors = COLORMAP.map(color => `rgb(${color})`).join(",");
  const bar = element("span", { className: "bar", style: `background: linear-gradient(90deg, ${colors})` });
  const response = element("span", { textContent: "underlined: response" });
  return element("div", { className: "legend" }, "closed, 0", bar, "1, open", response);
}

// The distribution of gates: one stepped line for each series {name, mark, color, dashes, bins}.
function histogramChart(series) {
  const width = 420, height = 130;
  const shares = series.map(({ bins }) => {
    const total = bins.reduce((a, b) => a + b, 0);
    return bins.map(count => count / total);
  });
  const top = Math.max(...shares.flat(), 1e-9);
  const svg = svgElement("svg", {
    viewBox: `0 0 ${width} ${height + 34}`, width, role: "img",
    "aria-label": "distribution of gates: share of gates by value",
  });
  svg.append(svgElement("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }));
  series.forEach(({ name, mark, color, dashes }, i) => {
    const corners = shares[i].flatMap((share, bin) => [[bin, share], [bin + 1, share]]);
    const points = corners.map(
      ([edge, share]) => `${edge / shares[i].length * width},${height - share / top * (height - 8)}`,
    ).join(" ");
    svg.append(
      svgElement("polyline", {
        points, fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": dashes,
      }),
      svgElement("text", { x: 60 + 120 * i, y: height + 30, style: `fill: ${color}` }, `${mark} ${name}`),
    );
  });
  for (const g of [0, 0.25, 0.5, 0.75, 1]) {
    const anchor = g === 0 ? "start" : g === 1 ? "end" : "middle";
    svg.append(svgElement("text", { x: g * width, y: height + 14, "text-anchor": anchor }, g));
  }
  return svg;
}

// Lines of gates from 0 to 1: series are [name, values], null for no value; labels name the points.
function lineChart(series, labels, title) {
  const width = 460, height = 170, left = 30, last = labels.length - 1;
  const x = i => left + i / Math.max(1, last) * (width - left - 6);
  const y = g => height - g * (height - 6);
  const svg = svgElement("svg", {
    viewBox: `0 0 ${width} ${height + 52}`, width, role: "img", "aria-label": title,
  });
  for (const g of [0, .25, .5, .75, 1]) {
    svg.append(
      svgElement("line", { class: "axis", x1: left, x2: width, y1: y(g), y2: y(g) }),
      svgElement("text", { x: left - 4, y: y(g) + 4, "text-anchor": "end" }, g),
    );
  }
  series.forEach(([name, values], k) => {
    const color = SERIES_COLORS[k % SERIES_COLORS.length];
    const points = values.map((g, i) => g === null ? null : `${x(i)},${y(g)}`).filter(Boolean).join(" ");
    const key = { x: left + (k % 4) * 108, y: height + 32 + 15 * Math.floor(k / 4), style: `fill: ${color}` };
    svg.append(
      svgElement("polyline", {
        points, fill: "none", stroke: color, "stroke-width": 2,
        "stroke-dasharray": SERIES_DASHES[k % SERIES_DASHES.length],
      }),
      svgElement("text", key, "■ " + name),
    );
  });
  for (const i of unique([0, Math.floor(last / 2), last])) {
    const anchor = i ? "end" : "start";
    svg.append(svgElement("text", { x: x(i), y: height + 15, "text-anchor": anchor }, labels[i]));
  }
  return svg;
}

// A heatmap: gates[k] holds the gates of layers[k] at each token, or null if the layer has no gate to show.
// Calls onToken with the index of the token under the mouse.
function heatmapChart(layers, gates, tokens, promptLength, onToken) {
  const cell = 14, rowHeight = cell / 1.6, left = 34, bottom = 86;
  const width = left + tokens.length * cell, height = layers.length * rowHeight;
  const canvas = element("canvas", {
    className: "heatmap", width: 2 * width, height: 2 * (height + bottom), role: "img",
    "aria-label": `heatmap of ${layers.length} layers by ${tokens.length} tokens`,
    style: `width: ${width}px; height: ${height + bottom}px`,
  });
  const ink = getComputedStyle(document.body).color;
  const pen = canvas.getContext("2d");
  pen.scale(2, 2); // sharp on screens with two pixels for each CSS pixel
  pen.font = "10px system-ui, sans-serif";
  layers.forEach((layer, k) => {
    const y = (layers.length - 1 - k) * rowHeight; // the first layer is at the bottom
    if (gates[k]) {
      gates[k].forEach((g, i) => {
        pen.fillStyle = gateColor(g);
        pen.fillRect(left + i * cell, y, cell, rowHeight);
      });
    }
    if (k % 5 === 0) {
      pen.fillStyle = ink;
      pen.textAlign = "right";
      pen.fillText(layer, left - 5, y + rowHeight);
    }
  });
  pen.fillStyle = ink;
  tokens.forEach((token, i) => {
    pen.save();
    pen.translate(left + (i + .7) * cell, height + 5);
    pen.rotate(Math.PI / 2);
    pen.textAlign = "left";
    pen.fillText(token.slice(0, 12), 0, 3);
    pen.restore();
  });
  if (promptLength > 0 && promptLength < tokens.length) {
    pen.fillStyle = "#fff";
    pen.fillRect(left + promptLength * cell - 1, 0, 2, height);
  }
  canvas.addEventListener("mousemove", event => {
    const i = Math.floor((event.offsetX - left) / cell);
    if (i >= 0 && i < tokens.length) onToken(i);
  });
  return canvas;
}
