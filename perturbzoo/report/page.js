"use strict";
(() => {
  const page = JSON.parse(document.getElementById("content").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const STATES = { ahead: "\u25b2 ahead", level: "\u25cf level", behind: "\u25bc behind", unknown: "\u2013 unknown" };
  const ARROWS = { higher: "\u2191", lower: "\u2193", "near 1": "\u21921" };
  const metrics = Object.fromEntries(page.metrics.map((metric) => [metric.name, metric]));
  const kinds = Object.fromEntries(page.rows.map((row) => [row.name, row.kind]));
  const contenders = page.rows.filter((row) => row.kind !== "ceiling");
  const tip = document.getElementById("tip");

  // ---- elements: text is always set as text, whatever a file called it ----
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }
  const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const section = (id) => document.getElementById(id);
  const note = (text) => make("p", { class: "note" }, text);

  function number(value, digits) {
    if (value === null || value === undefined) return "\u2013";
    const text = value.toFixed(digits);
    return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
  }
  const interval = (low, high, digits) => (low === null || low === undefined ? "" : `[${number(low, digits)}, ${number(high, digits)}]`);
  // long names in one word may break between a small and a capital letter, with a hyphen
  const breakable = (name) => name.replace(/([a-z]{2})([A-Z][a-z]{2})/g, "$1\u00ad$2").replace(/([a-z]{6})(?=[a-z]{5})/g, "$1\u00ad");
  const words = (name) => name.replaceAll("_", " ");
  const titled = (metric) => `${metric.label}\u00a0${ARROWS[metric.better]}`;

  function select(label, options, chosen, change, id) {
    const list = make("select", { id, onchange: () => change(list.value) });
    for (const [value, text, group] of options) {
      let parent = list;
      if (group) {
        parent = [...list.children].find((child) => child.label === group);
        if (!parent) list.append((parent = make("optgroup", { label: group })));
      }
      parent.append(make("option", { value }, text));
    }
    list.value = chosen;
    return make("label", {}, label, list);
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= raw * 0.999);
    const found = [];
    for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(value);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return found.map((value) => ({ value, text: number(value, digits) }));
  }

  // the outermost two, where more would run into each other
  const ends = (found, few) => (few && found.length > 2 ? [found[0], found.at(-1)] : found);

  function showTip(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY + 16 + box.height > window.innerHeight ? event.clientY - box.height - 12 : event.clientY + 16}px`;
  }
  const hideTip = () => { tip.hidden = true; };

  // ---- against the floors ----
  function drawFloors() {
    const place = section("floors");
    const models = Object.keys(page.verdict.models);
    place.append(note(`Paired differences over ${page.unit} to the floor that the verdict rests on, above 0 in favour of the model, with their 95 % intervals. `
      + "Ahead: clear of every floor. Behind: clearly beaten by one. Not corrected for looking at several metrics."));
    if (!page.verdict.n_floors) place.append(note("There are no floors in this folder, so nothing to compare with."));
    const detail = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Differences to the floors" });
    function show(model) {
      detail.replaceChildren(make("table", { class: "wide", id: "differences" },
        make("thead", {}, make("tr", {}, ...["metric", "", "paired advantage", model, "decisive floor", "its mean", "n"].map((text, at) =>
          make("th", { scope: "col", class: [2, 3, 5, 6].includes(at) ? "number" : null }, text)))),
        make("tbody", {}, page.verdict.models[model].map((row) => {
          const metric = metrics[row.metric];
          const all = page.scores[row.metric].all || {};
          const mean = (name) => number(all[name] ? all[name][1] : null, metric.digits);
          return make("tr", { class: row.metric === page.main ? "chosen" : null, "data-metric": row.metric },
            make("th", { scope: "row", title: metric.definition }, titled(metric)),
            make("td", { class: `state ${row.state}` }, STATES[row.state]),
            make("td", { class: "number" }, number(row.advantage, metric.digits), " ",
              make("span", { class: "n" }, interval(row.low, row.high, metric.digits))),
            make("td", { class: "number" }, mean(model)), make("td", {}, row.rival || "\u2013"), make("td", { class: "number" }, mean(row.rival)),
            make("td", { class: "number n" }, String(row.n)));
        }))));
    }
    if (models.length > 1) {
      const names = page.shown.map((name) => metrics[name]).filter((metric) => metric.better !== "near 1");
      place.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Models against floors" },
        make("table", { class: "wide", id: "matrix" },
          make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "model"), names.map((metric) =>
            make("th", { scope: "col", title: metric.definition }, titled(metric))))),
          make("tbody", {}, models.map((model) => make("tr", { class: "model" }, make("th", { scope: "row" }, breakable(model)), names.map((metric) => {
            const row = page.verdict.models[model].find((entry) => entry.metric === metric.name) || { state: "unknown" };
            return make("td", { class: `state ${row.state}`, title: row.rival ? `decisive floor: ${row.rival}` : null }, STATES[row.state]);
          })))))));
      place.append(make("div", { class: "controls" }, select("Differences of", models.map((name) => [name, name]), models[0], show, "model-of-floors")));
    }
    place.append(detail);
    if (models.length) show(models[0]);
  }

  // ---- leaderboard and categories ----
  let metricName = page.main;
  let category = "all";
  const better = (metric, value) => (metric.better === "higher" ? -value : metric.better === "lower" ? value : Math.abs(value - 1));

  function ordered(metric, found) {
    const rows = page.rows.filter((row) => found[row.name] && found[row.name][1] !== null);
    return rows.sort((a, b) => (b.kind === "ceiling") - (a.kind === "ceiling")
      || better(metric, found[a.name][1]) - better(metric, found[b.name][1]));
  }

  function scale(values, withZero) {
    const known = values.filter((value) => value !== null && value !== undefined);
    let low = Math.min(...known), high = Math.max(...known);
    if (withZero) { low = Math.min(low, 0); high = Math.max(high, 0); }
    if (low === high) { low -= 0.5; high += 0.5; }
    const margin = 0.04 * (high - low);
    const from = withZero && low === 0 ? 0 : low - margin, to = withZero && high === 0 ? 0 : high + margin;
    return { low: from, high: to, at: (value) => 100 * (value - from) / (to - from) };
  }

  function scoreTable(metric, found, bars, label) {
    const rows = ordered(metric, found);
    const axis = scale(rows.flatMap((row) => found[row.name].slice(1, 4)), true);
    const line = found[page.line] && found[page.line][1] !== null ? found[page.line][1] : null;
    const narrow = bars || window.innerWidth < 500;
    const x = (value) => `${axis.at(value).toFixed(2)}%`;
    const vertical = (value, name) => draw("line", { class: name, x1: x(value), x2: x(value), y1: "0", y2: "100%" });
    const shown = bars ? rows.filter((row) => row.kind !== "ceiling") : rows;
    const body = shown.map((row, position) => {
      const [n, mean, low, high, sd] = found[row.name];
      const plot = draw("svg", { role: "img", "aria-label": `${row.name}: ${number(mean, metric.digits)}` }, vertical(0, "axis"));
      if (line !== null && row.name !== page.line) plot.append(vertical(line, "guide"));
      if (bars) {
        const start = Math.min(axis.at(0), axis.at(mean)), size = Math.abs(axis.at(mean) - axis.at(0));
        plot.append(draw("rect", { class: `bar-${row.kind}`, x: `${start}%`, width: `${Math.max(size, 0.4)}%`, y: "50%", height: 14, transform: "translate(0 -7)" }));
      }
      if (low !== null) plot.append(draw("line", { class: bars ? "over" : `whisker whisker-${row.kind}`, x1: x(low), x2: x(high), y1: "50%", y2: "50%" }));
      if (!bars) {
        plot.append(row.kind === "ceiling"
          ? draw("rect", { class: "mark-ceiling", x: x(mean), y: "50%", width: 3, height: 12, transform: "translate(-1.5 -6)" })
          : draw("circle", { class: `mark-${row.kind}`, cx: x(mean), cy: "50%", r: 4.2 }));
      }
      const last = row.kind === "ceiling" && shown[position + 1] && shown[position + 1].kind !== "ceiling";
      return make("tr", { class: `${row.kind}${last ? " last-ceiling" : ""}`, "data-row": row.name },
        make("th", { scope: "row" }, breakable(row.name), bars ? null : make("span", { class: "kind" }, ` ${row.kind}`)),
        make("td", { class: "plot" }, plot),
        make("td", { class: "value number" }, make("b", {}, number(mean, metric.digits)),
          bars ? null : make("span", { class: "interval" }, interval(low, high, metric.digits)),
          bars || sd === null ? null : make("span", { class: "interval seeds" }, `\u00b1 ${number(sd, metric.digits)} over seeds`)),
        bars ? null : make("td", { class: "n number" }, String(n)));
    });
    const feet = draw("svg", { "aria-hidden": "true" }, ends(ticks(axis.low, axis.high, narrow ? 2 : 4), narrow).map((tick) =>
      draw("text", { class: "quiet small", x: x(tick.value), y: "70%", "text-anchor": "middle" }, tick.text)));
    return make("table", { class: "scores", "aria-label": label },
      bars ? null : make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "prediction"), make("th", { scope: "col", class: "plot" }, make("span", {}, titled(metric))),
        make("th", { scope: "col", class: "value" }, "mean, 95 % interval"), make("th", { scope: "col", class: "n" }, "n"))),
      make("tbody", {}, body), make("tfoot", { "aria-hidden": "true" }, make("tr", {}, make("th"), make("td", { class: "plot" }, feet), make("td", { class: "value" }),
        bars ? null : make("td", { class: "n" }))));
  }

  function drawLeaderboard() {
    const place = section("leaderboard");
    const board = make("div", { id: "board" });
    const definition = make("p", { class: "note", id: "definition" });
    const whole = make("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "All metrics" });
    const panels = make("div", { class: "panels", id: "panels" });
    const under = make("p", { class: "note" });
    function show() {
      const metric = metrics[metricName];
      definition.textContent = `${metric.definition} ${metric.better === "near 1" ? "Nearer to 1" : metric.better[0].toUpperCase() + metric.better.slice(1)} is better.`.trim();
      const found = page.scores[metricName][category] || {};
      board.replaceChildren(Object.keys(found).some((name) => found[name][1] !== null)
        ? scoreTable(metric, found, false, `${metric.label}, ${words(category)}`)
        : note("No condition of this category has a value."));
      const names = page.categories.filter((name) => name !== "all");
      under.textContent = `${titled(metric)}: means, with intervals as lines${page.line ? `; the dashed line is the ${page.line}` : ""}.`;
      panels.replaceChildren(...names.map((name) => {
        const rows = page.scores[metricName][name] || {};
        const counts = Object.values(rows).map((entry) => entry[0]);
        const n = counts.length ? Math.max(...counts) : 0;
        return make("div", { "data-category": name }, make("h3", {}, words(name), make("span", { class: "kind" }, `  n = ${n}`)),
          n ? scoreTable(metric, rows, true, `${metric.label}, ${words(name)}`) : note("No conditions."));
      }));
      whole.replaceChildren(make("table", { class: "wide", id: "whole" },
        make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "metric"), page.rows.map((row) =>
          make("th", { scope: "col", class: "number" }, row.name, make("span", { class: "kind" }, ` ${row.kind}`))))),
        make("tbody", {}, page.metrics.map((entry) => make("tr", {}, make("th", { scope: "row", title: entry.definition }, titled(entry)),
          page.rows.map((row) => {
            const cell = (page.scores[entry.name][category] || {})[row.name] || [0, null, null, null];
            return make("td", { class: "number" }, number(cell[1], entry.digits), make("span", { class: "interval" }, interval(cell[2], cell[3], entry.digits)));
          }))))));
    }
    place.append(
      make("div", { class: "controls" },
        select("Metric", [...page.shown.map((name) => metrics[name]), ...page.metrics.filter((metric) => !page.shown.includes(metric.name))].map((metric) =>
          [metric.name, titled(metric), page.metrics.length > page.shown.length ? (page.shown.includes(metric.name) ? "shown above" : "others") : null]), metricName, (value) => { metricName = value; show(); }, "metric"),
        page.categories.length > 1 ? select("Conditions", page.categories.map((name) => [name, words(name)]), category, (value) => { category = value; show(); }, "category") : null),
      definition, page.line ? note(`The dashed line is the ${page.line}. Intervals are over ${page.unit}${page.seeds ? "; \u00b1 is the standard deviation over seeds" : ""}.`) : null, board,
      make("details", {}, make("summary", {}, `All ${page.metrics.length} metrics in one table`), make("div", {}, whole)));
    section("categories").append(under, panels);
    if (page.categories.length < 2) section("categories").append(note("All conditions are of one category."));
    show();
  }

  // ---- ranks ----
  function wrapped(text, width) {
    const lines = [""];
    for (const word of text.split(" ")) {
      if (lines.at(-1) && (lines.at(-1) + word).length >= width) lines.push("");
      lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
    }
    return lines;
  }
  const clipped = (text, size) => (text.length > size ? `${text.slice(0, size - 1)}\u2026` : text);

  function drawRanks() {
    const place = section("ranks");
    const names = page.shown.filter((name) => page.ranks[name]);
    const rows = contenders.filter((row) => names.some((name) => page.ranks[name][row.name]));
    place.append(note("1 is best, by the mean over all conditions; ceilings do not compete. Those that share a rank stand below one another, with a line beside them. Ranks say nothing of how large a difference is: the intervals above do."));
    const side = 172, step = Math.max(66, Math.min(130, 725 / Math.max(names.length - 1, 1))), line = 24, top = 74;
    const width = 2 * side + step * Math.max(names.length - 1, 0), height = top + line * rows.length + 14;
    const x = (at) => side + step * at, y = (rank) => top + line * (rank - 0.5);
    const chart = draw("svg", { class: "bump", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Ranks of models and floors in each metric; the table below has the same numbers" });
    names.forEach((name, at) => {
      const lines = wrapped(metrics[name].label, step < 80 ? 11 : 13);
      lines[lines.length - 1] += ` ${ARROWS[metrics[name].better]}`;
      chart.append(draw("line", { class: "rule", x1: x(at), x2: x(at), y1: top - 6, y2: height - 8 }),
        draw("text", { class: `small ${name === page.main ? "" : "quiet"}`, "text-anchor": "middle" }, lines.map((text, row) =>
          draw("tspan", { x: x(at), y: top - 14 - 14 * (lines.length - 1 - row) }, text))));
    });
    const pick = (group, on) => { chart.classList.toggle("picked", on); group.classList.toggle("on", on); if (on) chart.append(group); };
    // each row has a line of its own at each metric, those that share a rank below one another: names stand at their points
    const places = names.map((name) => {
      const list = rows.filter((row) => page.ranks[name][row.name]).sort((a, b) => page.ranks[name][a.name] - page.ranks[name][b.name]);
      return Object.fromEntries(list.map((row, position) => [row.name, position + 1]));
    });
    names.forEach((name, at) => {
      const order = Object.keys(places[at]).sort((a, b) => places[at][a] - places[at][b]);
      order.slice(1).forEach((row, position) => {
        if (page.ranks[name][row] === page.ranks[name][order[position]])
          chart.append(draw("line", { class: "tie", x1: x(at) + 8, x2: x(at) + 8, y1: y(position + 1), y2: y(position + 2) }));
      });
    });
    const models = rows.filter((row) => row.kind === "model").map((row) => row.name);
    const mark = (row, px, py) => {
      const shape = row.kind === "model" ? models.indexOf(row.name) % 5 : 0, r = shape ? 5.5 : 4.2;
      return shape === 0 ? draw("circle", { class: "mark", cx: px, cy: py, r })
        : draw("path", { class: "mark", d: { 1: `M${px - 4.5},${py - 4.5}h9v9h-9Z`, 2: `M${px},${py - r}L${px + r},${py + 4.5}H${px - r}Z`,
          3: `M${px},${py - r}L${px + r},${py}L${px},${py + r}L${px - r},${py}Z`, 4: `M${px},${py + r}L${px + r},${py - 4.5}H${px - r}Z` }[shape] });
    };
    const label = (row, at) => {
      const place = places[at] && places[at][row.name];
      const where = at ? { x: x(at) + 14 } : { x: side - 12, "text-anchor": "end" };
      return place ? draw("text", { ...where, y: y(place) + 4 }, clipped(row.name, 22)) : null;
    };
    for (const row of [...rows].sort((a, b) => (a.kind === "model") - (b.kind === "model"))) {
      const points = names.map((name, at) => [at, places[at][row.name]]).filter((point) => point[1]);
      let path = "", before = null;
      for (const [at, rank] of points) {
        path += before === null ? `M${x(at)},${y(rank)}` : at - before > 1 ? `M${x(at)},${y(rank)}`
          : `C${x(at) - step / 2},${y(places[before][row.name])} ${x(at) - step / 2},${y(rank)} ${x(at)},${y(rank)}`;
        before = at;
      }
      const group = draw("g", { class: `row ${row.kind} dash-${models.indexOf(row.name) % 3}`, "data-row": row.name }, draw("path", { class: "line", d: path }), draw("path", { class: "hit", d: path }),
        points.map(([at, rank]) => mark(row, x(at), y(rank))), label(row, 0), names.length > 1 ? label(row, names.length - 1) : null);
      group.addEventListener("pointerenter", (event) => { pick(group, true); showTip(event, `${row.name} (${row.kind})`); });
      group.addEventListener("pointerleave", () => { pick(group, false); hideTip(); });
      chart.append(group);
    }
    place.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Ranks" }, chart),
      make("details", {}, make("summary", {}, "The ranks as a table"), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Ranks as a table" },
        make("table", { class: "wide", id: "rank-table" },
          make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "prediction"), names.map((name) => make("th", { scope: "col", class: "number" }, titled(metrics[name]))))),
          make("tbody", {}, rows.map((row) => make("tr", { class: row.kind }, make("th", { scope: "row" }, breakable(row.name)), names.map((name) => {
            const rank = page.ranks[name][row.name];
            return make("td", { class: "number" }, rank ? number(rank, Number.isInteger(rank) ? 0 : 1) : "\u2013");
          }))))))));
  }

  // ---- one condition ----
  function drawConditions() {
    const place = section("conditions"), deltas = page.deltas;
    if (!deltas || !deltas.items.length) {
      place.append(note("There is no test/deltas.h5ad in this folder, so no changes to show: test again with this version of perturbzoo."));
      return;
    }
    let at = 0, source = 0;
    const figure = make("div", {}), facts = make("div", { id: "facts" }), live = make("p", { class: "note", "aria-live": "polite", id: "shown" });
    const name = (item) => [item.condition, item.context, item.split].filter(Boolean).join(" | ");
    function show() {
      const item = deltas.items[at], predicted = item.predicted[source];
      live.textContent = `${name(item)}: ${words(item.category)}, ${item.n.toLocaleString("en")} cells. ${deltas.sources[source]} (${kinds[deltas.sources[source]] || "floor"}).`;
      const points = item.genes.map((gene, row) => ({ gene: deltas.genes[gene], observed: item.observed[row] / 1e4,
        predicted: predicted[row] === null ? null : predicted[row] / 1e4 })).filter((point) => point.predicted !== null);
      const largest = [...points].sort((a, b) => Math.abs(b.observed) - Math.abs(a.observed));
      figure.replaceChildren(points.length ? scatter(points, new Set(item.targets), new Set(largest.slice(0, 20).map((point) => point.gene)), figure.clientWidth)
        : note("This row has no prediction for this condition."));
      const scores = item.scores[source];
      facts.replaceChildren(
        make("h3", {}, "Scores of this condition"),
        make("dl", { class: "facts" }, deltas.metrics.flatMap((metric, row) => [make("dt", {}, metric.label),
          make("dd", { "data-metric": metric.name }, number(scores ? scores[row] : null, 4))])),
        make("h3", {}, "Largest observed changes"),
        make("table", { id: "genes" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "gene"),
          make("th", { scope: "col", class: "number" }, "observed"), make("th", { scope: "col", class: "number" }, "predicted"))),
        make("tbody", {}, largest.slice(0, 10).map((point) => make("tr", {},
          make("th", { scope: "row" }, point.gene, item.targets.includes(point.gene) ? make("span", { class: "kind" }, " target") : null),
          make("td", { class: "number" }, number(point.observed, 3)), make("td", { class: "number" }, number(point.predicted, 3)))))));
    }
    const list = select("Condition", deltas.items.map((item, row) => [String(row), name(item), words(item.category)]), "0", (value) => { at = Number(value); show(); }, "condition");
    const move = (by) => { at = (at + by + deltas.items.length) % deltas.items.length; list.querySelector("select").value = String(at); show(); };
    place.append(
      note("Predicted against observed change of each gene. A prediction that is right lies on the dashed line; one that is too timid lies flat."),
      make("div", { class: "controls" }, list,
        make("span", { class: "pair" }, make("button", { type: "button", "aria-label": "Previous condition", onclick: () => move(-1) }, "\u2190"),
          make("button", { type: "button", "aria-label": "Next condition", onclick: () => move(1) }, "\u2192")),
        select("Model or floor", deltas.sources.map((text, row) => [String(row), `${text} (${kinds[text] || "floor"})`]), "0", (value) => { source = Number(value); show(); }, "source")),
      live, make("div", { class: "figures" }, figure, facts), ...deltas.notes.map(note));
    show();
  }

  function scatter(points, targets, top, width) {
    const size = Math.min(480, Math.max(300, width || 480)), left = 52, right = 12, above = 10, below = 46;
    const limit = 1.06 * Math.max(1e-6, ...points.flatMap((point) => [Math.abs(point.observed), Math.abs(point.predicted)]));
    const x = (value) => left + (size - left - right) * (value + limit) / (2 * limit);
    const y = (value) => size - below - (size - above - below) * (value + limit) / (2 * limit);
    const chart = draw("svg", { class: "scatter", viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": "Predicted against observed change; the table beside it has the largest" });
    for (const tick of ticks(-limit, limit, 5)) {
      chart.append(draw("line", { class: "rule", x1: x(tick.value), x2: x(tick.value), y1: above, y2: size - below }),
        draw("line", { class: "rule", x1: left, x2: size - right, y1: y(tick.value), y2: y(tick.value) }),
        draw("text", { class: "quiet", x: x(tick.value), y: size - below + 18, "text-anchor": "middle" }, tick.text),
        draw("text", { class: "quiet", x: left - 8, y: y(tick.value) + 4, "text-anchor": "end" }, tick.text));
    }
    chart.append(draw("line", { class: "axis", x1: x(0), x2: x(0), y1: above, y2: size - below }), draw("line", { class: "axis", x1: left, x2: size - right, y1: y(0), y2: y(0) }),
      draw("line", { class: "guide", x1: x(-limit), y1: y(-limit), x2: x(limit), y2: y(limit) }),
      draw("text", { x: (left + size - right) / 2, y: size - 8, "text-anchor": "middle" }, "observed change, log1p-normalised"),
      draw("text", { transform: `translate(13 ${(above + size - below) / 2}) rotate(-90)`, "text-anchor": "middle" }, "predicted change"));
    const rank = (point) => (targets.has(point.gene) ? 2 : top.has(point.gene) ? 1 : 0);
    const marks = [...points].sort((a, b) => rank(a) - rank(b)).map((point) => {
      const px = x(point.observed), py = y(point.predicted), r = rank(point);
      const node = r === 2 ? draw("path", { class: "target", d: `M${px},${py - 7}L${px + 7},${py}L${px},${py + 7}L${px - 7},${py}Z` })
        : draw("circle", { class: r ? "top" : "gene", cx: px, cy: py, r: r ? 4 : 2.6 });
      chart.append(node);
      return { point, node, px, py };
    });
    // names of the targets and of the five largest, where they do not lie on another
    const boxes = [];
    const named = [...marks].reverse().filter((mark) => rank(mark.point)).sort((a, b) => rank(b.point) - rank(a.point) || Math.abs(b.point.observed) - Math.abs(a.point.observed));
    for (const mark of named.slice(0, 12)) {
      const text = clipped(mark.point.gene, 16), width = 7.2 * text.length + 4, flip = mark.px + 10 + width > size - right;
      const box = { x: flip ? mark.px - 10 - width : mark.px + 10, y: mark.py - 7, width };
      if (boxes.length >= 7 || boxes.some((other) => Math.abs(other.y - box.y) < 14 && box.x < other.x + other.width && other.x < box.x + box.width)) continue;
      boxes.push(box);
      chart.append(draw("text", { class: "name", x: flip ? mark.px - 10 : mark.px + 10, y: mark.py + 4, "text-anchor": flip ? "end" : "start" }, text));
    }
    let on = null;
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect(), factor = size / box.width;
      const px = (event.clientX - box.left) * factor, py = (event.clientY - box.top) * factor;
      let near = null, least = 18 ** 2;
      for (const mark of marks) {
        const distance = (mark.px - px) ** 2 + (mark.py - py) ** 2;
        if (distance <= least) { least = distance; near = mark; }
      }
      if (on) on.node.classList.remove("on");
      on = near;
      if (!near) return hideTip();
      near.node.classList.add("on");
      showTip(event, `${near.point.gene}${targets.has(near.point.gene) ? " (target)" : ""}\nobserved ${number(near.point.observed, 3)}, predicted ${number(near.point.predicted, 3)}`);
    });
    chart.addEventListener("pointerleave", () => { if (on) on.node.classList.remove("on"); hideTip(); });
    const key = (name, shape, text) => make("span", {}, fill(draw("svg", { viewBox: "-8 -8 16 16", class: "key scatter", style: "display:inline-block;width:.8rem" }), {}, [
      shape === "path" ? draw("path", { class: name, d: "M0,-7L7,0L0,7L-7,0Z" }) : draw("circle", { class: name, r: shape })]), ` ${text}`);
    return make("div", {}, chart, make("div", { class: "legend" }, key("target", "path", "perturbed gene"), key("top", 6, "20 largest observed changes"), key("gene", 4, "other genes")));
  }

  // ---- heat map ----
  function drawHeat() {
    const place = section("heatmap"), heat = page.heat;
    if (!heat || !heat.genes.length) {
      place.append(note("There is no test/deltas.h5ad in this folder, or nothing changes in it."));
      return;
    }
    const cell = 11.2, side = 152, gap = 14, top = 92, columns = heat.genes.length, rows = heat.conditions.length;
    const width = side + 2 * columns * cell + gap + 4, height = top + rows * 15 + 24;
    const board = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Heat map" });
    let source = 0;
    function show() {
      const predicted = heat.predicted[source];
      const limit = Math.max(1, ...heat.observed.flat().map((value) => Math.abs(value || 0)));
      const chart = draw("svg", { class: "heat", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Observed change and that of ${heat.sources[source]}` });
      [["observed", heat.observed], [heat.sources[source], predicted]].forEach(([title, values], panel) => {
        const start = side + panel * (columns * cell + gap);
        chart.append(draw("text", { x: start, y: 14, "font-weight": 600 }, clipped(title, 60)));
        heat.genes.forEach((gene, column) => chart.append(draw("text", { class: "small quiet", transform: `translate(${start + column * cell + cell / 2 + 4} ${top - 5}) rotate(-90)` }, clipped(gene, 11))));
        values.forEach((row, line) => row.forEach((value, column) => {
          const shown = value === null ? 0 : value;
          const rect = draw("rect", { class: "cell", x: start + column * cell, y: top + line * 15, width: cell, height: 15,
            style: `fill: var(${shown < 0 ? "--fall" : "--rise"}); fill-opacity: ${Math.min(1, Math.abs(shown) / limit).toFixed(3)}` });
          rect.addEventListener("pointermove", (event) => showTip(event, `${heat.conditions[line]}, ${heat.genes[column]}\n`
            + `observed ${number(heat.observed[line][column] / 1e4, 3)}, ${heat.sources[source]} ${predicted[line][column] === null ? "\u2013" : number(predicted[line][column] / 1e4, 3)}`));
          chart.append(rect);
        }));
        chart.append(draw("rect", { class: "frame", x: start, y: top, width: columns * cell, height: rows * 15, "pointer-events": "none" }));
      });
      heat.conditions.forEach((name, line) => chart.append(draw("text", { class: "small", x: side - 8, y: top + line * 15 + 11, "text-anchor": "end" }, clipped(name, 20))));
      chart.addEventListener("pointerleave", hideTip);
      const swatch = (name, alpha) => make("span", { class: "key", style: `background: color-mix(in srgb, var(${name}) ${alpha}%, var(--paper))` });
      board.replaceChildren(chart);
      legend.replaceChildren(make("span", {}, `\u2212${number(limit / 1e4, 2)}`), make("span", {}, ...[100, 66, 33].map((a) => swatch("--fall", a)), swatch("--rise", 0), ...[33, 66, 100].map((a) => swatch("--rise", a))),
        make("span", {}, `+${number(limit / 1e4, 2)}`), make("span", {}, "change, log1p-normalised; one scale for both sides, stronger predictions are cut"));
    }
    const legend = make("div", { class: "legend" });
    place.append(note(heat.note), make("div", { class: "controls" },
      select("Beside the observed change", heat.sources.map((text, row) => [String(row), `${text} (${kinds[text] || "floor"})`]), "0", (value) => { source = Number(value); show(); }, "heat-source")), board, legend);
    show();
  }

  // ---- calibration ----
  function frame(label, sideLabel, low, high, body) {
    const size = 340, left = 56, below = 48, room = 10;
    const x = (value) => left + (size - left - room) * (value - low) / (high - low);
    const y = (value) => size - below - (size - below - room) * (value - low) / (high - low);
    const chart = draw("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": `${sideLabel} against ${label}` });
    for (const tick of ticks(low, high, 4)) {
      chart.append(draw("line", { class: "rule", x1: x(tick.value), x2: x(tick.value), y1: room, y2: size - below }),
        draw("line", { class: "rule", x1: left, x2: size - room, y1: y(tick.value), y2: y(tick.value) }),
        draw("text", { class: "quiet", x: x(tick.value), y: size - below + 17, "text-anchor": "middle" }, tick.text),
        draw("text", { class: "quiet", x: left - 7, y: y(tick.value) + 4, "text-anchor": "end" }, tick.text));
    }
    chart.append(draw("line", { class: "guide", x1: x(low), y1: y(low), x2: x(high), y2: y(high) }),
      draw("text", { x: (left + size) / 2, y: size - 9, "text-anchor": "middle" }, label),
      draw("text", { transform: `translate(12 ${(size - below) / 2}) rotate(-90)`, "text-anchor": "middle" }, sideLabel));
    body(chart, x, y);
    return chart;
  }

  function drawCalibration() {
    const place = section("calibration");
    if (!page.uncertainty.length) {
      place.append(note("No model here predicts its own error (none has calibration.csv and uncertainty.csv), so there is nothing to calibrate."));
      return;
    }
    place.append(note("Left: how many of the expressed genes' observed means lie within intervals that should hold the wanted share. Above the line they are too wide, "
      + "below too narrow. Right: predicted and true error of each condition (root mean square over genes); errors worth having rank the true ones."));
    for (const model of page.uncertainty) {
      const low = Math.max(0, Math.floor(10 * Math.min(...model.curve.flat())) / 10 - 0.1);
      const points = model.points.filter((point) => point[1] !== null && point[2] !== null);
      const most = 1.06 * Math.max(1e-6, ...points.flatMap((point) => point.slice(1)));
      const left = frame("wanted share within the intervals", "reached share", low, 1, (chart, x, y) => {
        chart.append(draw("path", { d: model.curve.map(([level, reached], at) => `${at ? "L" : "M"}${x(level)},${y(reached)}`).join(""), fill: "none", stroke: "var(--accent)", "stroke-width": 2 }));
        for (const [level, reached] of model.curve) {
          const dot = draw("circle", { class: "mark-model", cx: x(level), cy: y(reached), r: 4 });
          dot.addEventListener("pointermove", (event) => showTip(event, `wanted ${number(level, 2)}, reached ${number(reached, 3)}`));
          dot.addEventListener("pointerleave", hideTip);
          chart.append(dot);
        }
      });
      const right = frame("predicted error of a condition", "true error", 0, most, (chart, x, y) => points.forEach((point) => {
        const dot = draw("circle", { class: "mark-model", cx: x(point[1]), cy: y(point[2]), r: 3.2, opacity: 0.75 });
        dot.addEventListener("pointermove", (event) => showTip(event, `${point[0]}\npredicted ${number(point[1], 4)}, true ${number(point[2], 4)}`));
        dot.addEventListener("pointerleave", hideTip);
        chart.append(dot);
      }));
      const at90 = model.curve.find(([level]) => Math.abs(level - 0.9) < 1e-9);
      place.append(make("h3", { style: "margin-top:1.2rem" }, model.model),
        make("p", { class: "note" }, `${at90 ? `90 % intervals cover ${number(100 * at90[1], 0)} %. ` : ""}Predicted and true error: Spearman ${number(model.spearman, 2)} over ${model.n} conditions.`),
        make("div", { class: "figures", style: "grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 24rem)); margin-top: .8rem" }, left, right));
    }
  }

  // ---- data and words ----
  function drawData() {
    const about = page.about;
    const place = section("data");
    if (page.description) place.append(make("p", { class: "note" }, page.description));
    if (about.missing) place.append(note(about.missing));
    place.append(make("dl", { class: "facts" }, about.entries.flatMap(([name, text]) => [make("dt", {}, name), make("dd", { class: text.includes("\n") ? "lines" : null }, text)])));
    section("words").append(make("dl", { class: "facts" },
      Object.entries(page.glossary).flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]),
      page.metrics.filter((metric) => metric.definition).flatMap((metric) => [make("dt", {}, titled(metric)), make("dd", {}, metric.definition)])));
  }

  const names = { floors: "Floors", leaderboard: "Leaderboard", categories: "Categories", ranks: "Ranks", conditions: "Conditions", heatmap: "Heat map", calibration: "Calibration", data: "Data", words: "Definitions" };
  section("sections").append(...Object.entries(names).map(([id, text]) => make("a", { href: `#${id}` }, text)));
  drawFloors();
  drawLeaderboard();
  drawRanks();
  drawConditions();
  drawHeat();
  drawCalibration();
  drawData();
  // a table that goes on to the right says so
  const shade = (board) => board.classList.toggle("more", board.scrollLeft + board.clientWidth < board.scrollWidth - 2);
  const boards = [...document.querySelectorAll(".scroll")];
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => shade(entry.target)));
  boards.forEach((board) => { board.addEventListener("scroll", () => shade(board), { passive: true }); watch.observe(board); shade(board); });
  document.documentElement.dataset.ready = "yes";
})();
