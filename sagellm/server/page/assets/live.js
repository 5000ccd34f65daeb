"use strict";
const SPAN = 300, HEIGHT = 150, LEFT = 46, RIGHT = 6, TOP = 8, BOTTOM = 20;
const seconds = [];  // figures of the last SPAN seconds, oldest first
let lastSecond = -1, now = 0;

const count = (value) => value == null ? "\u2013" : Math.round(value).toLocaleString("en");
const time = (value) => {
  if (value == null) return "\u2013";
  if (value >= 10) return value.toFixed(0) + "\u00a0s";
  if (value >= 1) return value.toFixed(2) + "\u00a0s";
  const ms = value * 1000;
  return (ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2)) + "\u00a0ms";
};
const axisTime = (value) => value >= 1 ? +value.toPrecision(3) + "\u00a0s" : +(value * 1000).toPrecision(3) + "\u00a0ms";
const percent = (value) => value == null ? "\u2013" : (value * 100).toFixed(value && value < 0.1 ? 1 : 0) + "\u00a0%";
const axisCount = (value) => value >= 10000 ? +(value / 1000).toPrecision(3) + "k" : String(+value.toPrecision(3));

const CHARTS = [
  {title: "Output tokens per second", show: count, axis: axisCount, least: 10, lines: [
    ["all instances", (s) => s.output_tokens]]},
  {title: "Requests", show: count, axis: axisCount, least: 4, lines: [
    ["running", (s) => s.gauges.num_running], ["queued", (s) => s.gauges.num_queued]]},
  {title: "Requests per second", show: count, axis: axisCount, least: 4, lines: [
    ["completed", (s) => s.finished], ["refused", (s) => s.rejected]]},
  {title: "Time to first token (TTFT)", show: time, axis: axisTime, least: 0.001, lines: [
    ["median", (s) => s.ttft_p50_s], ["90th percentile", (s) => s.ttft_p90_s]]},
  {title: "Time per output token (TPOT)", show: time, axis: axisTime, least: 0.001, lines: [
    ["median", (s) => s.tpot_p50_s], ["90th percentile", (s) => s.tpot_p90_s]]},
  {title: "KV cache in use", show: percent, axis: percent, least: 1, lines: [
    ["all instances", (s) => s.gauges.kv_usage]]},
];

function element(name, attributes, ...children) {
  const isSvg = ["svg", "path", "line", "text", "rect"].includes(name);
  const made = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/* The smallest 1, 2 or 5 times a power of ten that is not below the value. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((bound) => bound >= value * 0.9999);
}

function build(chart) {
  const keys = chart.lines.map(([name], index) => {
    const value = element("b");
    const swatch = element("i", {class: "swatch", style: `background: var(--line${index})`});
    return {value, node: element("span", {class: "key"}, swatch, name + " ", value)};
  });
  chart.values = keys.map((key) => key.value);
  chart.svg = element("svg", {role: "img", "aria-label": chart.title});
  const caption = element("figcaption", {}, element("h3", {}, chart.title), ...keys.map((key) => key.node));
  document.getElementById("charts").append(element("figure", {class: "chart"}, caption, chart.svg));
  chart.svg.addEventListener("pointermove", (event) => point(chart, event));
  chart.svg.addEventListener("pointerleave", () => { chart.pointed = null; document.getElementById("tip").hidden = true; draw(chart); });
}

function draw(chart) {
  const width = Math.max(chart.svg.clientWidth, 200);
  const x = (second) => LEFT + (width - LEFT - RIGHT) * (1 - (now - second) / SPAN);
  chart.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const all = chart.lines.flatMap(([, value]) => seconds.map(value)).filter((value) => value != null);
  const top = roundUp(Math.max(chart.least, ...all));
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top;
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const at = y(top * share);
    parts.push(element("line", {class: share ? "grid" : "base", x1: LEFT, x2: width - RIGHT, y1: at, y2: at}));
    parts.push(element("text", {x: LEFT - 6, y: at + 4, "text-anchor": "end"}, share ? chart.axis(top * share) : "0"));
  }
  for (const [ago, label] of [[300, "5 min ago"], [150, "2.5 min"], [0, "now"]]) {
    const anchor = ago === 300 ? "start" : ago ? "middle" : "end";
    parts.push(element("text", {x: x(now - ago), y: HEIGHT - 4, "text-anchor": anchor}, label));
  }
  chart.lines.forEach(([, value], index) => {
    const {line, dots} = pathsOf(value, x, y), style = `stroke: var(--line${index})`;
    parts.push(element("path", {d: line, style}), element("path", {class: "dots", d: dots, style}));
  });
  if (chart.pointed != null) {
    const at = x(chart.pointed);
    parts.push(element("line", {class: "cursor", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM}));
  }
  chart.svg.replaceChildren(...parts);
  const newest = [...seconds].reverse();
  chart.lines.forEach(([, value], index) => {
    const known = newest.slice(0, 10).map(value).find((each) => each != null);
    chart.values[index].textContent = chart.show(known);
  });
}

/* A line through the seconds that have a value. It breaks over long gaps; what stands alone there is a dot. */
function pathsOf(value, x, y) {
  let line = "", dots = "", run = [], last = -Infinity;
  const end = () => {
    if (run.length > 1) line += "M" + run.join("L");
    if (run.length === 1) dots += `M${run[0]}h0.01`;
    run = [];
  };
  for (const each of seconds) {
    const shown = value(each);
    if (shown == null) continue;
    if (each.second - last > 10) end();
    run.push(x(each.second).toFixed(1) + " " + y(shown).toFixed(1));
    last = each.second;
  }
  end();
  return {line, dots};
}

function point(chart, event) {
  const box = chart.svg.getBoundingClientRect();
  const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
  const wanted = Math.round(now - SPAN * (1 - share));
  const found = seconds.find((each) => each.second === wanted);
  const tip = document.getElementById("tip");
  chart.pointed = found ? wanted : null;
  tip.hidden = !found;
  draw(chart);
  if (!found) return;
  const lines = chart.lines.map(([name, value]) => `${name} ${chart.show(value(found))}`);
  tip.replaceChildren(...[`${now - wanted} s ago`, ...lines].map((line) => element("div", {}, line)));
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = event.clientY + 14 + "px";
}

function showTotals(figures) {
  const totals = [
    ["in progress", count(figures.num_unfinished)], ["completed", count(figures.num_finished)],
    ["refused", count(figures.num_rejected)], ["failed", count(figures.num_failed)],
    ["prompt tokens", count(figures.num_prompt_tokens)], ["output tokens", count(figures.num_output_tokens)],
  ];
  document.getElementById("totals").replaceChildren(...totals.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function instanceRow(each) {
  const usage = each.num_blocks ? each.num_blocks_in_use / each.num_blocks : 0;
  const bar = element("span", {class: "bar"}, element("i", {style: `width: ${(usage * 100).toFixed(1)}%`}));
  const core = each.core_us_per_step == null ? "\u2013" : each.core_us_per_step.toFixed(0) + "\u00a0\u00b5s";
  const head = (text, kind) => element("th", kind ? {class: kind} : {}, text);
  const cell = (text) => element("td", {}, text);
  return element("tr", {},
    head(each.instance_id), head(each.role), head(each.device), head(each.is_lost ? "lost" : "up", each.is_lost ? "lost" : "serving"),
    cell(`${count(each.num_running)} of ${count(each.max_num_seqs)}`), cell(count(each.num_waiting)),
    element("th", {}, bar, `${percent(usage)} of ${count(each.num_blocks)}`),
    cell(count(each.num_steps)), cell(count(each.num_prompt_tokens)), cell(count(each.num_output_tokens)),
    cell(percent(each.prefix_hit_share)), cell(count(each.num_preemptions)), cell(core));
}

function setState(state) {
  const chip = document.getElementById("state");
  chip.textContent = state;
  chip.className = "state " + state;
}

function show(figures) {
  if (figures.now_second < now) { seconds.length = 0; lastSecond = -1; }  // the server was started again
  now = figures.now_second;
  for (const each of figures.seconds) if (each.second > lastSecond) { seconds.push(each); lastSecond = each.second; }
  while (seconds.length && seconds[0].second < now - SPAN) seconds.shift();
  document.title = `${figures.model} \u00b7 sageLLM`;
  document.getElementById("model").textContent = figures.model;
  document.getElementById("version").textContent = figures.version;
  setState(figures.state);
  showTotals(figures);
  document.getElementById("instances").replaceChildren(...figures.instances.map(instanceRow));
  CHARTS.forEach(draw);
}

async function update() {
  try {
    const answer = await fetch("sagellm/live?since=" + lastSecond, {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.status);
    show(await answer.json());
  } catch (error) {
    setState("not reachable");
  }
  setTimeout(update, document.hidden ? 5000 : 1000);
}

CHARTS.forEach(build);
addEventListener("resize", () => CHARTS.forEach(draw));
update();
