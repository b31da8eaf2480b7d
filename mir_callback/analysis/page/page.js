"use strict";
// Reads out values under a pointer, draws the heat maps, changes the axis, and shows and hides parts. What is chosen
// stands in the page's address, so that it outlives a reload and can be passed on.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const one = (selector, where = document) => where.querySelector(selector);
  const all = (selector, where = document) => [...where.querySelectorAll(selector)];
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const isHidden = (name) => document.body.classList.contains(`hide-${name}`);
  const runOf = (element) => Number(element.closest("[data-run]").dataset.run);
  const timeline = one(".timeline"), output = one(".layer-reading"), inputs = all(".controls input, select, [name=run]");
  const axis = () => data.axes[one("[name=axis]:checked").value];
  const chosen = () => one("[name=quantity]").value;

  function nearest(positions, at) {
    return positions.reduce((best, x, index) => Math.abs(x - at) < Math.abs(positions[best] - at) ? index : best, 0);
  }
  function across(chart, event) { // 0 to 1 over the chart's area
    const box = one(".area", chart).getBoundingClientRect();
    return (event.clientX - box.left) / box.width;
  }
  function point(chart, x) {
    chart.classList.toggle("pointed", x !== null);
    chart.style.setProperty("--cross", `${100 * x}%`);
    chart.dataset.at = x ?? "";
  }

  // Over the run: everything is drawn over the first axis, and moves from there to the chosen one, between evaluations
  // in proportion.
  function move(run, x) {
    const from = data.axes[0].x[run], to = axis().x[run];
    if (from === to || from.length < 2) return from === to ? x : to[0];
    let right = from.findIndex((known) => known >= x);
    right = right < 0 ? from.length - 1 : Math.max(1, right);
    const share = (x - from[right - 1]) / (from[right] - from[right - 1]);
    return clamp(to[right - 1] + share * (to[right] - to[right - 1]), 0, 1);
  }
  const remembered = (element, name) => element.dataset[name] ??= element.getAttribute(name);
  function changeAxis() {
    const labels = (ticks) => ticks.map(([at, text]) => Object.assign(document.createElement("span"), {textContent: text, style: `left:${100 * at}%`}));
    for (const path of all("g[data-run] path:not(.level)", timeline)) {
      const to = (_, pen, x) => `${pen}${(1000 * move(runOf(path), x / 1000)).toFixed(1)} `;
      path.setAttribute("d", remembered(path, "d").replace(/([ML])([-\d.]+) /g, to));
    }
    for (const bar of all("rect", timeline)) {
      const left = Number(remembered(bar, "x")), right = left + Number(remembered(bar, "width"));
      const [start, end] = [left, right].map((x) => 1000 * move(runOf(bar), x / 1000));
      bar.setAttribute("x", start);
      bar.setAttribute("width", end - start);
    }
    for (const mark of all(".over span", timeline)) {
      mark.style.left = `${100 * move(runOf(mark), parseFloat(mark.dataset.left ??= mark.style.left) / 100)}%`;
    }
    for (const grid of all(".uprights", timeline)) grid.setAttribute("d", axis().ticks.map(([at]) => `M${1000 * at} 0V1000`).join(""));
    one(".xticks", timeline).replaceChildren(...labels(axis().ticks));
    one(".xlabel", timeline).textContent = axis().label;
    one(".colours .xticks").replaceChildren(...labels(data.quantities[chosen()].ticks));
    one(".colours .what").textContent = data.quantities[chosen()].label;
    all("canvas", timeline).forEach(drawLayers);
    readTimeline(null);
  }

  const MISSING = 65535, decoded = new Map(); // 16 bits for each layer and evaluation; the highest code where there is no value
  function codesOf(name, run) {
    const text = data.quantities[name].codes[run];
    if (!decoded.has(text)) decoded.set(text, new Uint16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
    return decoded.get(text);
  }
  function read(name, run, layer, index) { // as text; layers count from 1
    const {low, high, log, layers} = data.quantities[name];
    const code = layer <= layers[run] ? codesOf(name, run)[(layer - 1) * data.runs[run].steps.length + index] : MISSING;
    const share = code / (MISSING - 1), value = log ? low * (high / low) ** share : low + (high - low) * share;
    return code === MISSING ? "" : String(Number(value.toPrecision(4)));
  }
  function colour(share) {
    const at = 16 * share, low = Math.min(15, Math.floor(at));
    const [r, g, b] = data.palette[low].map((part, index) => Math.round(part + (at - low) * (data.palette[low + 1][index] - part)));
    return (255 << 24 | b << 16 | g << 8 | r) >>> 0;
  }
  function drawLayers(canvas) {
    const run = runOf(canvas), positions = axis().x[run], count = positions.length, layers = data.quantities[chosen()].layers[run];
    const codes = codesOf(chosen(), run), width = canvas.width = 1200, height = canvas.height = Math.max(1, layers);
    const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const half = (index) => count > 1 ? (positions[index + 1] - positions[index]) / 2 : 1; // of the gap after it
    for (let index = 0; index < count; index++) {
      const [left, right] = [-half(Math.max(0, index - 1)), half(Math.min(count - 2, index))].map((by) => Math.round(width * clamp(positions[index] + by, 0, 1)));
      for (let layer = 0; layer < layers; layer++) {
        const code = codes[layer * count + index], row = (layers - 1 - layer) * width;
        if (code !== MISSING) pixels.fill(colour(code / (MISSING - 1)), row + left, row + Math.max(left + 1, right));
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function readTimeline(at) {
    let cross = null;
    for (const row of all(".reading tbody tr")) {
      const run = data.runs[runOf(row)], positions = axis().x[runOf(row)];
      const index = at === null ? positions.length - 1 : nearest(positions, at);
      for (const cell of all("[data-field]", row)) cell.textContent = run[cell.dataset.field][index];
      if (at === null) one("[data-field=loss]", row).textContent = run.last_loss;
      one("[data-field=verdict]", row).title = run.reason[index];
      const nearer = cross === null || Math.abs(positions[index] - at) < Math.abs(cross - at);
      if (at !== null && !isHidden(`run-${runOf(row)}`) && nearer) cross = positions[index];
    }
    point(timeline, cross);
    output.textContent = "";
  }
  function readLayer(event) {
    const area = event.target.closest(".map .area");
    if (!area) return;
    const run = runOf(area), {label, layers} = data.quantities[chosen()], box = area.getBoundingClientRect();
    const index = nearest(axis().x[run], across(timeline, event));
    const layer = clamp(Math.ceil((1 - (event.clientY - box.top) / box.height) * layers[run]), 1, layers[run]);
    const value = read(chosen(), run, layer, index);
    if (value === "") return;
    const name = data.runs.length > 1 ? `${data.runs[run].name}, ` : "";
    output.textContent = `${name}layer ${layer}, step ${data.runs[run].steps[index]}: ${label} ${value}`;
  }

  // Over the layers
  function layersOf(chart) { // their positions, 0 to 1
    const count = Math.max(...data.quantities[chart.dataset.quantity].layers);
    return Array.from({length: count}, (_, index) => (index + 0.5) / count);
  }
  function readProfile(chart, at) {
    const x = layersOf(chart), layer = at === null ? null : 1 + nearest(x, at), said = [];
    point(chart, at === null ? null : x[layer - 1]);
    data.runs.forEach((run, number) => Object.keys(data.moments).forEach((moment) => {
      const value = at === null || isHidden(`run-${number}`) || isHidden(moment) ? "" : read(chart.dataset.quantity, number, layer, run.at[moment]);
      if (value) said.push(`${data.runs.length > 1 ? run.name + " " : ""}${data.moments[moment]} ${value}`);
    }));
    one("output", chart).textContent = at === null ? "" : `layer ${layer}: ${said.join(", ")}`;
  }

  function listen(chart, show, stops) {
    chart.addEventListener("pointermove", (event) => { show(across(chart, event)); if (chart === timeline) readLayer(event); });
    for (const event of ["pointerleave", "blur"]) chart.addEventListener(event, () => show(null));
    chart.addEventListener("keydown", (event) => {
      const positions = stops(), last = positions.length - 1;
      const here = chart.dataset.at ? nearest(positions, Number(chart.dataset.at)) : event.key === "ArrowRight" ? -1 : last + 1;
      const next = {ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last}[event.key];
      if (next === undefined || last < 0) return;
      event.preventDefault();
      one(".reading").setAttribute("aria-live", "polite");
      show(positions[clamp(next, 0, last)]);
    });
  }

  function choose(input) {
    if (["run", "moment"].includes(input.name)) {
      const name = input.name === "run" ? `run-${input.value}` : input.value;
      document.body.classList.toggle(`hide-${name}`, !input.checked);
    }
  }

  if (timeline) {
    for (const part of all(".controls, .hint")) part.hidden = false;
    for (const input of all("[name=run]")) input.hidden = data.runs.length < 2;
    const state = location.hash.slice(1).split(".");
    if (state.length === inputs.length) inputs.forEach((input, index) => {
      if (input.type === "select-one") input.selectedIndex = Number(state[index]); else input.checked = state[index] === "1";
    });
    inputs.forEach(choose);
    document.addEventListener("change", (event) => {
      choose(event.target);
      changeAxis();
      history.replaceState(null, "", "#" + inputs.map((input) => input.type === "select-one" ? input.selectedIndex : Number(input.checked)).join("."));
    });
    listen(timeline, readTimeline, () => [...new Set(axis().x.filter((_, run) => !isHidden(`run-${run}`)).flat())].sort((a, b) => a - b));
    for (const chart of all(".profile")) listen(chart, (at) => readProfile(chart, at), () => layersOf(chart));
    changeAxis();
  }
  const seconds = Number(document.body.dataset.reload); // a page that is written anew while training runs
  if (seconds > 0) setTimeout(() => location.reload(), 1000 * seconds);
})();
