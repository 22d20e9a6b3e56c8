// The sections of the gate report, in the order of the page.

const report = JSON.parse(document.getElementById("report").textContent);
const PHASES = {
  prompt: { name: "prompt", color: "var(--prompt)", mark: "─", dashes: "none" },
  response: { name: "response", color: "var(--response)", mark: "╌", dashes: "5 2" },
  response_read: { name: "response, read", color: "var(--response)", mark: "╌", dashes: "5 2" },
  response_generated: { name: "response, generated", color: "var(--generated)", mark: "┈", dashes: "2 2" },
};
const selected = { text: 0, token: 0, module: "" }; // module: a projection type, "" for the mean of all

const titleOf = adapter => adapter.source.adapter;
const tokenMean = (adapter, text, token) => mean(adapter.gates[text].map(module => module[token]));
function phaseOf(text, token) {
  return token < text.prompt ? "prompt" : text.decoded ? "response, generated" : "response";
}

function section(title, note) {
  const heading = element("h2", { textContent: title });
  const node = element("section", {}, heading, element("p", { className: "note", textContent: note }));
  document.getElementById("main").append(node);
  return node;
}

// One card for each adapter; `contents` returns a card's children.
function cards(contents) {
  const card = (adapter, i) => element("div", { className: "card" }, ...contents(adapter, i));
  return element("div", { className: "columns" }, ...report.adapters.map(card));
}

function adapterHeading(adapter) {
  return element("h3", { textContent: titleOf(adapter) });
}

function options(entries) {
  return entries.map(([value, textContent]) => element("option", { value, textContent }));
}

// --- header ---

function addSource() {
  const prefix = i => report.adapters.length > 1 ? `${"AB"[i]}: ` : "";
  const entries = [
    ...Object.entries(report.computed_from),
    ...report.adapters.flatMap(
      (adapter, i) => Object.entries(adapter.source).map(([name, value]) => [prefix(i) + name, value]),
    ),
  ];
  const rows = entries.map(([name, value]) => element(
    "tr", {}, element("th", { scope: "row", textContent: name }), element("td", { textContent: value }),
  ));
  document.getElementById("source").append(element("table", {}, ...rows));
}

// --- summary ---

function addSummary() {
  const note = "Over all texts, tokens and modules. "
    + `A gate is closed below ${report.closed_below} and open from ${report.open_from} on.`;
  section("Summary", note).append(cards(adapter => {
    const columns = ["", "tokens", "mean", "closed", "open"];
    const head = columns.map(name => element("th", { scope: "col", textContent: name }));
    const rows = adapter.phases.map(phase => {
      const found = adapter.statistics[phase];
      const values = [
        found.tokens, formatGate(found.mean), formatShare(found.share_closed), formatShare(found.share_open),
      ];
      return element(
        "tr", {},
        element("th", { scope: "row", textContent: PHASES[phase].name }),
        ...values.map(value => element("td", { className: "number", textContent: value })),
      );
    });
    const table = element(
      "table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows),
    );
    const series = adapter.phases.filter(phase => adapter.statistics[phase].tokens).map(
      phase => ({ ...PHASES[phase], bins: adapter.statistics[phase].bins }),
    );
    return [adapterHeading(adapter), table, histogramChart(series)];
  }));
}

// --- tokens ---

function addTokens() {
  const node = section(
    "Tokens",
    "The color is the mean gate over all modules. Point at a token, or use the arrow keys, to see its gate "
    + "in each layer and module.",
  );
  const texts = report.texts.map((text, i) => [i, `${i + 1}: ${text.title}`]);
  const choice = element("select", { id: "text", onchange: event => {
    selected.text = Number(event.target.value);
    selected.token = 0;
    redraw();
  } }, ...options(texts));
  node.append(
    element("label", { htmlFor: "text", textContent: "text " }), choice, legend(),
    element("div", { id: "drill", className: "drill", "aria-live": "polite" }),
    element("div", { id: "strips" }),
  );
}

function drawStrips() {
  const text = report.texts[selected.text];
  document.getElementById("strips").replaceChildren(cards((adapter, which) => {
    const tokens = text.tokens.map((token, i) => {
      const g = tokenMean(adapter, selected.text, i);
      return element("span", {
        className: "token" + (i >= text.prompt ? " response" : ""),
        role: "option",
        tabindex: i === selected.token ? 0 : -1,
        textContent: token,
        "data-token": i,
        "data-adapter": which,
        style: `background: ${gateColor(g)}; color: ${textColorOn(g)}`,
        "aria-label": `${token}, ${phaseOf(text, i)}, gate ${formatGate(g)}`,
        onmouseenter: () => select(i),
        onfocus: () => select(i),
        onclick: event => event.target.focus(),
        onkeydown: moveByKey,
      });
    });
    const strip = element("div", { className: "strip", role: "listbox", "aria-label": "tokens" }, ...tokens);
    return [adapterHeading(adapter), strip];
  }));
}

function moveByKey(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
  const last = report.texts[selected.text].tokens.length - 1;
  const target = step ? selected.token + step : { Home: 0, End: last }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  const token = Math.min(Math.max(target, 0), last);
  const adapter = event.target.dataset.adapter;
  document.querySelector(`.token[data-adapter="${adapter}"][data-token="${token}"]`).focus();
}

function select(token) {
  selected.token = token;
  for (const node of document.querySelectorAll(".token")) {
    const chosen = Number(node.dataset.token) === token;
    node.setAttribute("aria-selected", chosen);
    node.tabIndex = chosen ? 0 : -1;
  }
  drawDrill();
}

// The gates of the selected token: one row for each projection type, one column for each layer.
function drawDrill() {
  const text = report.texts[selected.text], i = selected.token;
  document.getElementById("drill").replaceChildren(cards(adapter => {
    const gates = adapter.gates[selected.text];
    const layers = unique(adapter.modules.map(module => module.layer));
    const names = unique(adapter.modules.map(module => module.name));
    const gateOf = new Map(
      adapter.modules.map((module, k) => [`${module.layer} ${module.name}`, gates[k][i]]),
    );
    const cell = (layer, name) => {
      const g = gateOf.get(`${layer} ${name}`);
      return g === undefined ? element("td") : element("td", {
        title: `layer ${layer}, ${name}: ${g.toFixed(4)}`,
        textContent: g.toFixed(2).replace(/^0/, ""),
        style: `background: ${gateColor(g)}; color: ${textColorOn(g)}`,
      });
    };
    const head = layers.map(layer => element("th", { scope: "col", textContent: layer }));
    const rows = names.map(name => element(
      "tr", {}, element("th", { scope: "row", textContent: name }), ...layers.map(layer => cell(layer, name)),
    ));
    const position = `token ${i + 1} of ${text.tokens.length}, ${phaseOf(text, i)}`;
    const gate = formatGate(tokenMean(adapter, selected.text, i));
    return [
      element(
        "div", {}, element("b", { className: "context", textContent: text.tokens[i] }),
        ` — ${position}, mean gate ${gate}; columns are layers`,
      ),
      element(
        "table", { className: "grid" },
        element("thead", {}, element("tr", {}, element("th", { textContent: "" }), ...head)),
        element("tbody", {}, ...rows),
      ),
    ];
  }));
}

// --- heatmaps ---

function addHeatmaps() {
  const node = section(
    "Layers and tokens",
    "One column for each token and one row for each layer, the first layer at the bottom. The line marks "
    + "where the response begins.",
  );
  const names = unique(report.adapters.flatMap(adapter => adapter.modules.map(module => module.name)));
  const choice = element("select", { id: "module", onchange: event => {
    selected.module = event.target.value;
    drawHeatmaps();
  } }, ...options([["", "mean of all modules"], ...names.map(name => [name, name])]));
  node.append(
    element("label", { htmlFor: "module", textContent: "module " }), choice, legend(),
    element("div", { id: "heatmaps" }),
  );
}

function drawHeatmaps() {
  const text = report.texts[selected.text];
  document.getElementById("heatmaps").replaceChildren(cards(adapter => {
    const layers = unique(adapter.modules.map(module => module.layer)).sort((a, b) => a - b);
    const gates = layers.map(layer => {
      const modules = adapter.gates[selected.text].filter((_, k) => {
        const module = adapter.modules[k];
        return module.layer === layer && (!selected.module || module.name === selected.module);
      });
      return modules.length ? text.tokens.map((_, i) => mean(modules.map(module => module[i]))) : null;
    });
    const chart = heatmapChart(layers, gates, text.tokens, text.prompt, token => {
      if (token !== selected.token) select(token);
    });
    return [adapterHeading(adapter), chart];
  }));
}

// --- profiles and extremes ---

function addProfiles() {
  const note = textContent => element("p", { className: "note", textContent });
  section(
    "Profiles", "The mean gate by layer for each projection type, and by position in the text.",
  ).append(cards(adapter => {
    const found = [adapterHeading(adapter)];
    for (const phase of adapter.phases) {
      const statistics = adapter.statistics[phase], name = PHASES[phase].name;
      if (!statistics.tokens) continue;
      const series = Object.entries(statistics.mean_by_layer);
      const title = `mean gate of ${name} tokens by layer`;
      found.push(note(`${name}, by layer`), lineChart(series, statistics.layers, title));
    }
    const means = adapter.statistics.mean_by_position;
    const positions = means.map((_, i) => i + 1);
    found.push(note("by position (token number)"));
    found.push(lineChart([["all modules", means]], positions, "mean gate by position"));
    return found;
  }));
}

function addExtremes() {
  const node = section(
    "Most open and most closed tokens", "Tokens with the highest and the lowest mean gate, in their context.",
  );
  for (const [kind, title] of [["open", "most open"], ["closed", "most closed"]]) {
    const row = extreme => element(
      "tr", {},
      element("td", { className: "number", textContent: formatGate(extreme.mean) }),
      element(
        "td", { className: "context" }, extreme.before,
        element("b", {
          textContent: extreme.token,
          style: `background: ${gateColor(extreme.mean)}; color: ${textColorOn(extreme.mean)}`,
        }),
        extreme.after,
      ),
    );
    node.append(element("h3", { textContent: title }), cards(adapter => [
      element("p", { className: "note", textContent: titleOf(adapter) }),
      element("table", {}, ...adapter.extremes[kind].map(row)),
    ]));
  }
}

function redraw() {
  drawStrips();
  select(selected.token);
  drawHeatmaps();
}

addSource();
addSummary();
addTokens();
addHeatmaps();
addProfiles();
addExtremes();
redraw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawHeatmaps);
