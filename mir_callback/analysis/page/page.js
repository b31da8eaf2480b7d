"use strict";
// The charts are complete without this script. It reads out values under a pointer, and shows and hides parts.
// What is chosen stands in the page's address, so that it outlives a reload and can be passed on.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, where = document) => [...where.querySelectorAll(selector)];
  const body = document.body;
  const choices = new URLSearchParams(location.hash.slice(1));

  function remember(name, value, usual) {
    if (value === usual) choices.delete(name); else choices.set(name, value);
    const text = choices.toString();
    history.replaceState(null, "", text ? "#" + text : location.href.split("#")[0]);
  }

  const isHidden = (run) => body.classList.contains(`hide-run-${run}`);
  const currentTimeline = () => all(".timeline").find((chart) => !chart.hidden);
  const quantity = () => document.querySelector("select[name=quantity]")?.value ?? "per_layer";

  // Positions in a chart run from 0 to 1 over its area.
  function across(chart, event) {
    const box = chart.querySelector(".area").getBoundingClientRect();
    return (event.clientX - box.left) / box.width;
  }

  function nearest(positions, at) {
    let best = 0;
    positions.forEach((x, index) => {
      if (Math.abs(x - at) < Math.abs(positions[best] - at)) best = index;
    });
    return best;
  }

  function show(chart, x) {
    chart.classList.toggle("pointed", x !== null);
    if (x !== null) chart.style.setProperty("--cross", `${100 * x}%`);
  }

  // Over the run ------------------------------------------------------------------------------------------------------
  function readTimeline(chart, at) {
    const positions = data.x[chart.dataset.axis];
    let cross = null;
    for (const row of all(".reading tbody tr")) {
      const number = Number(row.dataset.run);
      const run = data.runs[number];
      const index = at === null ? run.steps.length - 1 : nearest(positions[number], at);
      for (const cell of all("[data-field]", row)) {
        cell.textContent = run[cell.dataset.field][index];
        if (cell.dataset.field === "verdict") cell.title = run.reason[index];
      }
      const x = positions[number][index];
      if (at !== null && !isHidden(number) && (cross === null || Math.abs(x - at) < Math.abs(cross - at))) cross = x;
    }
    show(chart, cross);
    chart.dataset.at = cross ?? "";
  }

  function readLayer(chart, event) {
    const output = document.querySelector(".layer-reading");
    const area = event?.target.closest(".map .area");
    output.textContent = "";
    if (!area) return;
    const box = area.getBoundingClientRect();
    const number = Number(/run-(\d+)/.exec(area.closest(".map").className)[1]);
    const run = data.runs[number];
    const index = nearest(data.x[chart.dataset.axis][number], across(chart, event));
    const values = run.layers[quantity()][index];
    const layer = Math.min(values.length, Math.max(1, Math.ceil((1 - (event.clientY - box.top) / box.height) * values.length)));
    if (!values.length) return;
    const label = data.profiles[quantity()].label;
    const name = data.runs.length > 1 ? `${run.name}, ` : "";
    output.textContent = `${name}layer ${layer}, step ${run.steps[index]}: ${label} ${values[layer - 1]}`;
  }

  function stepThrough(chart, key) {
    const visible = data.x[chart.dataset.axis].filter((_, run) => !isHidden(run));
    const stops = [...new Set(visible.flat())].sort((a, b) => a - b);
    if (!stops.length) return;
    const here = chart.dataset.at ? nearest(stops, Number(chart.dataset.at)) : stops.length - 1;
    const moves = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: stops.length - 1 };
    readTimeline(chart, stops[Math.min(stops.length - 1, Math.max(0, moves[key]))]);
  }

  for (const chart of all(".timeline")) {
    chart.addEventListener("pointermove", (event) => {
      readTimeline(chart, across(chart, event));
      readLayer(chart, event);
    });
    chart.addEventListener("pointerleave", () => { readTimeline(chart, null); readLayer(chart); });
    chart.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
      event.preventDefault();
      document.querySelector(".reading").setAttribute("aria-live", "polite");
      stepThrough(chart, event.key);
    });
    chart.addEventListener("blur", () => readTimeline(chart, null));
  }

  // Over the layers ---------------------------------------------------------------------------------------------------
  function readProfile(chart, at) {
    const profile = data.profiles[chart.dataset.profile];
    const output = chart.querySelector("output");
    const index = at === null ? null : nearest(profile.x, at);
    show(chart, index === null ? null : profile.x[index]);
    chart.dataset.at = index === null ? "" : profile.x[index];
    if (index === null) { output.textContent = ""; return; }
    const said = profile.series
      .filter((curve) => !isHidden(curve.run) && !body.classList.contains(`hide-${curve.moment}`) && curve.values[index])
      .map((curve) => `${data.runs.length > 1 ? data.runs[curve.run].name + " " : ""}${data.moments[curve.moment]} ${curve.values[index]}`);
    output.textContent = `layer ${index + 1}: ${said.join(", ")}`;
  }

  for (const chart of all(".profile")) {
    const positions = data.profiles[chart.dataset.profile].x;
    chart.addEventListener("pointermove", (event) => readProfile(chart, across(chart, event)));
    chart.addEventListener("pointerleave", () => readProfile(chart, null));
    chart.addEventListener("blur", () => readProfile(chart, null));
    chart.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const here = chart.dataset.at === undefined || chart.dataset.at === "" ? (move > 0 ? -1 : positions.length) : nearest(positions, Number(chart.dataset.at));
      readProfile(chart, positions[Math.min(positions.length - 1, Math.max(0, here + move))]);
    });
  }

  // Choices -----------------------------------------------------------------------------------------------------------
  const choose = {
    axis(input) {
      for (const chart of all(".timeline")) chart.hidden = chart.dataset.axis !== input.value;
      readTimeline(currentTimeline(), null);
      remember("axis", input.value, "step");
    },
    quantity(input) {
      for (const part of all(".layers")) part.hidden = part.dataset.quantity !== input.value;
      remember("quantity", input.value, "per_layer");
    },
    run(input) {
      body.classList.toggle(`hide-run-${input.value}`, !input.checked);
      remember("hidden", all("input[name=run]:not(:checked)").map((other) => other.value).join("."), "");
    },
    moment(input) {
      body.classList.toggle(`hide-${input.value}`, !input.checked);
      remember("moments", all("input[name=moment]:checked").map((other) => other.value).join("."), null);
    },
    order(input) {
      const list = document.querySelector(".samples");
      const size = (item) => input.value === "effect" ? -Math.abs(Number(item.dataset.effect)) : Number(item.dataset.index);
      list.append(...all("li", list).sort((a, b) => size(a) - size(b)));
      remember("order", input.value, "index");
    },
  };

  function restore() {
    for (const name of ["axis", "order"]) {
      const input = all(`input[name=${name}]`).find((other) => other.value === choices.get(name));
      if (input) { input.checked = true; choose[name](input); }
    }
    const select = document.querySelector("select[name=quantity]");
    if (select && [...select.options].some((option) => option.value === choices.get("quantity"))) {
      select.value = choices.get("quantity");
      choose.quantity(select);
    }
    const hidden = (choices.get("hidden") ?? "").split(".");
    const moments = choices.get("moments")?.split(".");
    for (const input of all("input[name=run]")) input.checked = !hidden.includes(input.value);
    for (const input of all("input[name=moment]")) {
      if (moments) input.checked = moments.includes(input.value);
      body.classList.toggle(`hide-${input.value}`, !input.checked);
    }
    for (const input of all("input[name=run]")) choose.run(input);
  }

  for (const part of all(".controls, .hint")) part.hidden = false;
  if (data.runs.length > 1) for (const input of all("input[name=run]")) input.hidden = false;
  document.addEventListener("change", (event) => choose[event.target.name]?.(event.target));
  restore();

  // A page that is written anew while training runs.
  const seconds = Number(body.dataset.reload);
  if (seconds > 0) setTimeout(() => location.reload(), 1000 * seconds);
})();
