"use strict";
// Draws the data block of this page. All that is computed was computed before; nothing is loaded.
(() => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("data").textContent);
  const CLOCK = 0, DURATION = 1, ENERGY = 2;
  const STAGE = 0, CHUNK = 1, MICROBATCH = 2, KIND = 3;
  const MARKERS = [["#009e73", "square"], ["#cc79a7", "diamond"], ["#b07d00", "triangle"], ["#56b4e9", "square"]];

  let current = data.first;
  let colour = "clock";

  // Numbers -----------------------------------------------------------------------------------------------------------

  const minus = (text) => (Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−"));
  const percent = (share) => `${minus((100 * share).toFixed(2))} %`;

  function quantity(value, unit, digits = 4) {
    const prefixes = [[1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"]].filter(([f]) => unit !== "s" || f <= 1);
    const [factor, prefix] = prefixes.find(([f]) => Math.abs(value) >= f) || [1, ""];
    const shown = value / factor;
    const whole = shown === 0 ? 1 : Math.max(1, Math.floor(Math.log10(Math.abs(shown))) + 1);
    return `${minus(shown.toFixed(Math.max(0, digits - whole)))} ${prefix}${unit}`;
  }

  const timeAndEnergy = (point) => `${quantity(point.time_s, "s")}, ${quantity(point.energy_j, "J")}`;

  function ticks(low, high, count) {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const decimals = Math.max(0, -Math.floor(Math.log10(step)) + (step / power === 2.5 ? 1 : 0));
    const marks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) marks.push(k * step);
    return marks.map((value) => ({ value, text: minus(value.toFixed(decimals)) }));
  }

  // Colours -----------------------------------------------------------------------------------------------------------

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const worth = (setting) => (colour === "clock" ? setting[CLOCK] : setting[ENERGY] / setting[DURATION]);
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

  function limits() {
    const values = data.settings.map(worth);
    const low = Math.min(...values), high = Math.max(...values);
    return low < high ? [low, high] : [0, high];
  }

  // Face colour of every setting, and whether dark text is readable on it.
  function faces() {
    const [low, high] = limits();
    const stops = data.ramps[colour].stops.map(channels);
    return data.settings.map((setting) => {
      const place = ((worth(setting) - low) / (high - low)) * (stops.length - 1);
      const k = Math.min(Math.floor(place), stops.length - 2);
      const rgb = stops[k].map((c, j) => Math.round(c + (place - k) * (stops[k + 1][j] - c)));
      return { face: `rgb(${rgb})`, light: 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 };
    });
  }

  // The frontier ------------------------------------------------------------------------------------------------------

  const chart = element("chart");
  let toX = null;

  function marker(shape, x, y, size, fill) {
    const d = {
      square: `M${x - size},${y - size}h${2 * size}v${2 * size}h${-2 * size}z`,
      diamond: `M${x},${y - 1.3 * size}l${1.3 * size},${1.3 * size}l${-1.3 * size},${1.3 * size}l${-1.3 * size},${-1.3 * size}z`,
      triangle: `M${x},${y - 1.2 * size}l${1.2 * size},${2.2 * size}h${-2.4 * size}z`,
      cross: `M${x - size},${y - size}l${2 * size},${2 * size}m0,${-2 * size}l${-2 * size},${2 * size}`,
    }[shape];
    const paint = shape === "cross" ? `fill="none" stroke="${fill}" stroke-width="3"` : `fill="${fill}"`;
    return `<path d="${d}" ${paint}/>`;
  }

  function drawChart() {
    const svg = chart.firstElementChild;
    const width = chart.clientWidth, height = 340;
    const left = 62, right = width - 14, top = 12, bottom = height - 44;
    const { times_s, energies_j } = data.frontier;
    const lastTime = times_s.at(-1);
    const span = Math.max(lastTime, data.before.time_s) - Math.min(times_s[0], data.before.time_s) || 0.02 * lastTime;
    const t0 = Math.min(times_s[0], data.before.time_s) - 0.05 * span;
    const t1 = Math.max(lastTime, data.before.time_s) + 0.12 * span;
    const near = data.others.flatMap((o) => o.points).filter(([t]) => t >= t0 && t <= t1).map(([, e]) => e);
    const energies = [...near, data.before.energy_j, energies_j[0], energies_j.at(-1)];
    const rise = Math.max(...energies) - Math.min(...energies) || 0.02 * energies[0];
    const e0 = Math.min(...energies) - 0.08 * rise, e1 = Math.max(...energies) + 0.08 * rise;
    toX = (t) => left + ((t - t0) / (t1 - t0)) * (right - left);
    const toY = (e) => bottom - ((e - e0) / (e1 - e0)) * (bottom - top);
    const [unit, factor] = e1 >= 1e6 ? ["MJ", 1e6] : e1 >= 1e3 ? ["kJ", 1e3] : ["J", 1];
    const ink = style("--ink"), faint = style("--faint"), grid = style("--grid");
    const parts = [];

    for (const { value, text } of ticks(t0, t1, Math.max(3, width / 140))) {
      parts.push(`<line x1="${toX(value)}" x2="${toX(value)}" y1="${top}" y2="${bottom}" stroke="${grid}"/>`);
      parts.push(`<text x="${toX(value)}" y="${bottom + 17}" text-anchor="middle" fill="${faint}">${text}</text>`);
    }
    for (const { value, text } of ticks(e0 / factor, e1 / factor, 5)) {
      const y = toY(value * factor);
      parts.push(`<line x1="${left}" x2="${right}" y1="${y}" y2="${y}" stroke="${grid}"/>`);
      parts.push(`<text x="${left - 7}" y="${y + 4}" text-anchor="end" fill="${faint}">${text}</text>`);
    }
    parts.push(`<text x="${(left + right) / 2}" y="${height - 6}" text-anchor="middle" fill="${ink}">Iteration time [s]</text>`);
    parts.push(
      `<text transform="translate(14 ${(top + bottom) / 2}) rotate(-90)" text-anchor="middle" fill="${ink}">Energy, one GPU per stage [${unit}]</text>`,
    );
    parts.push(`<clipPath id="inside"><rect x="${left}" y="${top - 8}" width="${right - left}" height="${bottom - top + 8}"/></clipPath>`);
    parts.push(`<g clip-path="url(#inside)">`);
    const path = (points) => points.map(([t, e], k) => `${k ? "L" : "M"}${toX(t).toFixed(1)},${toY(e).toFixed(1)}`).join("");
    const key = [];
    data.others.forEach((other, k) => {
      const [fill, shape] = MARKERS[k % MARKERS.length];
      parts.push(`<path d="${path(other.points)}" fill="none" stroke="${fill}"/>`);
      for (const [t, e] of other.points) parts.push(marker(shape, toX(t), toY(e), 3.2, fill));
      key.push([other.name, marker(shape, 0, 0, 4, fill)]);
    });
    const line = times_s.map((t, k) => [t, energies_j[k]]);
    const blue = style("--frontier");
    parts.push(`<path d="${path(line)}" fill="none" stroke="${blue}" stroke-width="2.5"/>`);
    for (const p of data.points) parts.push(`<circle cx="${toX(p.time_s)}" cy="${toY(p.energy_j)}" r="2" fill="${blue}"/>`);
    parts.push(marker("cross", toX(data.before.time_s), toY(data.before.energy_j), 5, ink));
    const end = [toX(lastTime), toY(energies_j.at(-1))];
    parts.push(`<circle cx="${end[0]}" cy="${end[1]}" r="5" fill="${blue}"/>`);
    parts.push(`<text x="${end[0]}" y="${end[1] - 11}" text-anchor="middle" fill="${ink}">T*</text>`);
    const chosen = data.points[current], x = toX(chosen.time_s), y = toY(chosen.energy_j);
    const red = style("--chosen");
    parts.push(`<path d="M${x},${bottom}V${y}H${left}" fill="none" stroke="${red}" stroke-dasharray="3 3"/>`);
    parts.push(`<circle cx="${x}" cy="${y}" r="7" fill="${red}" stroke="${style("--halo")}" stroke-width="2"/></g>`);

    key.push(["All clocks at maximum", marker("cross", 0, 0, 4, ink)]);
    key.push(["Frontier", `<path d="M-8,0h16" stroke="${blue}" stroke-width="2.5"/>`]);
    key.push(["This point's plan", `<circle r="5" fill="${red}"/>`]);
    key.forEach(([name, mark], k) => {
      const at = `translate(${right - 10} ${top + 14 + 19 * k})`;
      const words = `<text x="-16" y="4" text-anchor="end" fill="${ink}" stroke="${style("--halo")}" stroke-width="4" paint-order="stroke">${name}</text>`;
      parts.push(`<g transform="${at}">${words}${mark}</g>`);
    });
    svg.innerHTML = parts.join("");
    svg.setAttribute("aria-label", `Energy over iteration time; chosen: ${timeAndEnergy(chosen)}`);
  }

  function nearestPoint(event) {
    const x = event.clientX - chart.getBoundingClientRect().left;
    let best = 0;
    data.points.forEach((p, k) => {
      if (Math.abs(toX(p.time_s) - x) < Math.abs(toX(data.points[best].time_s) - x)) best = k;
    });
    return best;
  }

  // The timelines -----------------------------------------------------------------------------------------------------

  const longest = Math.max(...data.points.map((p) => p.time_s), data.before ? data.before.time_s : 0);
  const rowHeight = Math.max(12, Math.min(30, 480 / data.num_stages));
  const AXIS = 34, LEFT = 44;
  const timeToX = (canvas) => (canvas.clientWidth - LEFT - 8) / longest;

  const pipelineTime = (point) =>
    Math.max(...point.setting.map((s, k) => point.start_ticks[k] * data.tick_s + data.settings[s][DURATION]));
  const hasOutside = (point) => point.time_s - pipelineTime(point) > 1e-4 * longest;

  function box(point, k, perSecond) {
    const [stage, chunk, , kind] = data.instructions[k];
    const name = data.kinds[kind];
    const stagger = data.num_chunks > 1 ? 0.2 : 0;
    const shift = data.num_chunks > 1 ? (stagger * chunk) / (data.num_chunks - 1) : 0;
    const top = (stage + 0.07 + shift) * rowHeight, bottom = (stage + 0.93 - stagger + shift) * rowHeight;
    const x = LEFT + point.start_ticks[k] * data.tick_s * perSecond;
    const width = data.settings[point.setting[k]][DURATION] * perSecond;
    return { x, width, top, bottom, below: name === "backward" || name === "backward_input", above: name === "backward_weight" };
  }

  function drawTimeline(canvas, point) {
    const width = canvas.clientWidth, height = data.num_stages * rowHeight + AXIS;
    const scale = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const perSecond = timeToX(canvas), painted = faces();
    const ink = style("--ink"), faint = style("--faint");
    const family = getComputedStyle(document.body).fontFamily;
    pen.textAlign = "center";
    pen.textBaseline = "middle";

    pen.font = `12px ${family}`;
    const worked = pipelineTime(point);
    for (let stage = 0; stage < data.num_stages; stage++) {
      pen.fillStyle = style("--waiting");
      pen.fillRect(LEFT, (stage + 0.07) * rowHeight, worked * perSecond, 0.86 * rowHeight);
      pen.fillStyle = faint;
      pen.fillText(String(stage), LEFT - 12, (stage + 0.5) * rowHeight);
    }
    if (hasOutside(point)) {
      // Stripes from the last instruction to the end of the iteration.
      const from = LEFT + worked * perSecond, to = LEFT + point.time_s * perSecond, rows = data.num_stages * rowHeight;
      pen.save();
      pen.beginPath();
      pen.rect(from, 0, to - from, rows);
      pen.clip();
      pen.beginPath();
      for (let x = from - rows; x < to; x += 9) {
        pen.moveTo(x, rows);
        pen.lineTo(x + rows, 0);
      }
      pen.strokeStyle = faint;
      pen.lineWidth = 0.6;
      pen.stroke();
      pen.restore();
    }
    pen.save();
    pen.translate(9, (data.num_stages * rowHeight) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText("Stage", 0, 0);
    pen.restore();
    const floor = data.num_stages * rowHeight + 2;
    for (const { value, text } of ticks(0, longest, Math.max(3, width / 160))) {
      const x = LEFT + value * perSecond;
      pen.fillRect(x - 0.5, floor, 1, 4);
      pen.fillText(text, Math.min(x, width - 10), floor + 13);
    }
    pen.textAlign = "right";
    pen.fillText("Time [s]", width - 8, floor + 26);
    pen.textAlign = "center";

    const digits = String(data.num_microbatches - 1).length;
    const bar = Math.max(2, 0.1 * rowHeight), gap = Math.max(1, 0.05 * rowHeight);
    pen.font = `9.5px ${family}`;
    data.instructions.forEach((instruction, k) => {
      const b = box(point, k, perSecond);
      const edge = Math.min(0.8, 0.1 * b.width);
      const { face, light } = painted[point.setting[k]];
      const top = b.top + (b.above ? bar + gap : 0), bottom = b.bottom - (b.below ? bar + gap : 0);
      pen.fillStyle = face;
      pen.fillRect(b.x + edge / 2, top, b.width - edge, bottom - top);
      pen.fillStyle = ink;
      if (b.below) pen.fillRect(b.x + edge / 2, b.bottom - bar, b.width - edge, bar);
      if (b.above) pen.fillRect(b.x + edge / 2, b.top, b.width - edge, bar);
      if (b.width >= 5.3 * digits + 0.5 && rowHeight >= 18) {
        pen.fillStyle = light ? "#1f2328" : "#ffffff";
        pen.fillText(String(instruction[MICROBATCH]), b.x + b.width / 2, (b.top + b.bottom) / 2 + 0.1 * rowHeight);
      }
    });

    pen.beginPath();
    for (const k of point.critical_path) {
      const b = box(point, k, perSecond), y = (data.instructions[k][STAGE] + 0.3) * rowHeight;
      pen.lineTo(b.x, y);
      pen.lineTo(b.x + b.width, y);
    }
    pen.lineJoin = "round";
    pen.strokeStyle = "#ffffff";
    pen.lineWidth = 3.6;
    pen.stroke();
    pen.strokeStyle = data.ramps[colour].critical_path;
    pen.lineWidth = 2;
    pen.stroke();
  }

  const kindNames = {
    forward: "forward", backward: "backward", backward_input: "input gradient", backward_weight: "weight gradient",
    forward_backward: "forward and backward",
  };

  function drawLegend() {
    const ramp = data.ramps[colour], face = ramp.stops[3];
    const present = new Set(data.instructions.map((i) => data.kinds[i[KIND]]));
    const marks = [...present].map((name) => {
      const below = name === "backward" || name === "backward_input", above = name === "backward_weight";
      const css = `background-color:${face};border:0 solid var(--ink);` +
        (below ? "border-bottom-width:2px;padding-bottom:1px" : above ? "border-top-width:2px;padding-top:1px" : "");
      return `<span><i style="${css}"></i>${kindNames[name]}</span>`;
    });
    marks.push(`<span><i style="background:var(--waiting)"></i>waiting</span>`);
    marks.push(`<span><i style="height:2px;background:${ramp.critical_path}"></i>critical path</span>`);
    if (hasOutside(data.points[current])) {
      marks.push('<span><i style="background:repeating-linear-gradient(135deg,var(--faint) 0 1px,transparent 1px 6px)"></i>outside the pipeline</span>');
    }
    if (data.num_chunks > 1) marks.push("<span>later chunks stand lower</span>");
    element("legend").innerHTML = marks.join("");
    const [low, high] = limits();
    element("scale").innerHTML =
      `${Math.round(low)}<i style="background:linear-gradient(90deg,${ramp.stops})"></i>${Math.round(high)} ${ramp.label}`;
  }

  const pointShownBy = (canvas) => (canvas.id === "before" ? data.before : data.points[current]);

  function tip(event) {
    const canvas = event.currentTarget, area = canvas.getBoundingClientRect();
    const x = event.clientX - area.left, stage = Math.floor((event.clientY - area.top) / rowHeight);
    const point = pointShownBy(canvas), perSecond = timeToX(canvas), note = element("tip");
    const k = data.instructions.findIndex((instruction, place) => {
      if (instruction[STAGE] !== stage) return false;
      const b = box(point, place, perSecond);
      return x >= b.x && x < b.x + b.width;
    });
    note.hidden = k < 0;
    if (k < 0) return;
    const [, chunk, microbatch, kind] = data.instructions[k], setting = data.settings[point.setting[k]];
    const where = `stage ${stage}${data.num_chunks > 1 ? `, chunk ${chunk}` : ""}, microbatch ${microbatch}`;
    note.textContent = `${kindNames[data.kinds[kind]]}, ${where}\n${setting[CLOCK]} MHz, ` +
      `${quantity(setting[ENERGY] / setting[DURATION], "W", 3)}\n${quantity(setting[DURATION], "s")}, ${quantity(setting[ENERGY], "J")}`;
    note.style.left = `${Math.min(event.clientX + 14, window.innerWidth - note.offsetWidth - 8)}px`;
    note.style.top = `${Math.min(event.clientY + 14, window.innerHeight - note.offsetHeight - 8)}px`;
  }

  // The page ----------------------------------------------------------------------------------------------------------

  function drawNumbers() {
    const point = data.points[current];
    const numbers = [
      ["Iteration time", quantity(point.time_s, "s")],
      ["Energy, one GPU per stage", quantity(point.energy_j, "J")],
      ["Saving", percent(point.saving)],
      ["Slowdown", percent(point.slowdown)],
      ["Average power", quantity(point.energy_j / point.time_s, "W")],
      ["Gap to the proved bound", percent(point.gap)],
    ];
    if (point.marginal_power_w !== undefined) {
      numbers.splice(5, 0, ["Marginal power", quantity(point.marginal_power_w, "W")]);
    }
    element("numbers").innerHTML = numbers.map(([name, value]) => `<div><dt>${name}</dt><dd>${value}</dd></div>`).join("");
  }

  function drawClocks() {
    const rows = Array.from({ length: data.num_stages }, (_, stage) => [`<th scope="row">stage ${stage}</th>`]);
    data.instructions.forEach((instruction, k) => {
      rows[instruction[STAGE]].push(`<td>${data.settings[data.points[current].setting[k]][CLOCK]}</td>`);
    });
    element("clocks").innerHTML = rows.map((cells) => `<tr>${cells.join("")}</tr>`).join("");
  }

  function drawTimelines() {
    const point = data.points[current];
    if (data.before) {
      element("before-title").textContent = `All clocks at maximum: ${timeAndEnergy(data.before)}`;
      drawTimeline(element("before"), data.before);
    }
    element("plan-title").textContent =
      `Plan: ${timeAndEnergy(point)}; saving ${percent(point.saving)}, slowdown ${percent(point.slowdown)}`;
    drawTimeline(element("plan"), point);
  }

  function draw() {
    if (data.frontier) drawChart();
    drawNumbers();
    drawLegend();
    drawTimelines();
    drawClocks();
  }

  function choose(k) {
    current = Math.max(0, Math.min(data.points.length - 1, k));
    const slider = element("point");
    slider.value = current;
    slider.setAttribute("aria-valuetext", timeAndEnergy(data.points[current]));
    element("tip").hidden = true;
    if (data.frontier) drawChart();
    drawNumbers();
    drawTimelines();
    drawClocks();
  }

  // #point=17&colour=power opens the page there.
  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (data.ramps[asked.get("colour")]) {
      colour = asked.get("colour");
      document.querySelector(`input[value=${colour}]`).checked = true;
    }
    if (/^\d+$/.test(asked.get("point") || "")) current = Math.min(Number(asked.get("point")), data.points.length - 1);
  }

  readAddress();
  element("walk").hidden = !data.frontier;
  for (const id of ["before", "before-title"]) element(id).hidden = !data.before;
  element("summary").textContent = data.frontier
    ? `${data.points.length} points between the fastest iteration and T*, the one of least energy; each with a plan of real clocks.`
    : "One clock for every instruction of an iteration.";
  element("point").max = data.points.length - 1;
  element("point").addEventListener("input", (event) => choose(Number(event.target.value)));
  for (const kind of ["pointermove", "pointerdown"]) chart.addEventListener(kind, (event) => choose(nearestPoint(event)));
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && event.target.tagName !== "INPUT") choose(current + step);
  });
  for (const input of document.querySelectorAll("input[name=colour]")) {
    input.addEventListener("change", () => {
      colour = input.value;
      draw();
    });
  }
  for (const id of ["before", "plan"]) {
    for (const kind of ["pointermove", "pointerdown"]) element(id).addEventListener(kind, tip);
    element(id).addEventListener("pointerleave", () => (element("tip").hidden = true));
  }
  window.addEventListener("resize", draw);
  window.addEventListener("hashchange", () => {
    readAddress();
    choose(current);
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  choose(current);
  draw();
})();
