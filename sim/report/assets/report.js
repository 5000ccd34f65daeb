"use strict";
// Reads values under the pointer off the drawn lines. The page says all that matters without it.
(() => {
  const SCALE = 10000;
  const tip = document.getElementById("tip");
  const units = {
    duration: [[1e-6, 1e9, "ns"], [1e-3, 1e6, "µs"], [1, 1e3, "ms"], [120, 1, "s"], [7200, 1 / 60, "min"], [Infinity, 1 / 3600, "h"]],
    bytes: [[1e3, 1, "B"], [1e6, 1e-3, "kB"], [1e9, 1e-6, "MB"], [1e12, 1e-9, "GB"], [Infinity, 1e-12, "TB"]],
    share: [[Infinity, 100, "%"]],
    count: [[Infinity, 1, ""]],
  };
  const axis = (text) => {
    const [low, high, scale, kind] = text.split(",");
    const a = Number(low), b = Number(high);
    return { kind, at: (share) => (scale === "log" ? a * (b / a) ** share : a + (b - a) * share) };
  };
  const write = (kind, value) => {
    const [, factor, unit] = units[kind].find(([limit]) => Math.abs(value) < limit);
    return `${Number((value * factor).toPrecision(3)).toLocaleString("en")} ${unit}`.trim();
  };
  const points = (path) => {
    path.points ??= path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(" ").map(Number));
    return path.points;
  };
  const height = (path, x) => {
    const line = points(path);
    if (x < line[0][0] || x > line.at(-1)[0]) return null;
    let low = 0, high = line.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (line[middle][0] <= x) low = middle; else high = middle;
    }
    const [[x0, y0], [x1, y1]] = [line[low], line[high]];
    return x1 > x0 ? y0 + (y1 - y0) * (x - x0) / (x1 - x0) : y1;
  };
  const entry = (swatch, name, value) => {
    const row = document.createElement("p");
    if (swatch) row.append(Object.assign(document.createElement("i"), { className: `swatch ${swatch}` }));
    row.append(name);
    row.append(Object.assign(document.createElement("b"), { textContent: value }));
    return row;
  };
  const hide = (plot) => {
    tip.hidden = true;
    plot.querySelector(".cursor")?.remove();
  };
  const show = (plot, event) => {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    const lines = [...plot.querySelectorAll("path.line")];
    if (share < 0 || share > 1 || !lines.length) return hide(plot);
    const [x, y] = [axis(plot.dataset.x), axis(plot.dataset.y)];
    const rows = lines.map((path) => {
      const down = height(path, share * SCALE);
      const run = path.getAttribute("class").replace("line ", "");
      return down === null ? null : entry(run, path.dataset.name, write(y.kind, y.at(1 - down / SCALE)));
    });
    tip.replaceChildren(entry("", x.kind === "duration" ? "at" : "", write(x.kind, x.at(share))), ...rows.filter(Boolean));
    tip.hidden = false;
    const cursor = plot.querySelector(".cursor") ?? document.createElementNS(plot.namespaceURI, "line");
    for (const [name, value] of Object.entries({ class: "cursor", x1: `${share * 100}%`, x2: `${share * 100}%`, y1: "0%", y2: "100%" })) {
      cursor.setAttribute(name, value);
    }
    plot.append(cursor);
    const left = event.clientX + 14 + tip.offsetWidth > innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
  };
  for (const plot of document.querySelectorAll("svg.plot")) {
    plot.addEventListener("pointermove", (event) => show(plot, event));
    plot.addEventListener("pointerleave", () => hide(plot));
  }
})();
