// Methods against each other, and scores against how alike pictures look: two scatters of one picture, brushed together.

import { choice, el, get, integers, many, middle, number, numbers, picture, say, short, whole } from "./dom.js";
import { pick, pickButton } from "./picked.js";

const SHOWN = 60; // brushed images that are told of

export async function compare({ run, rest, params, set, signal }) {
  const row = Math.min(Number(rest[0]) || 0, run.queries.count - 1);
  try { sessionStorage.setItem(`query:${run.root}`, row); } catch { /* only a habit */ }
  const [about] = await get(`api/${run.number}/some/queries?rows=${row}`, signal);
  const axes = run.methods.map((method, at) => [`m${at}`, method.name]).filter((_, at) => !run.methods[at].missing);
  const absent = run.methods.filter((method) => method.missing).map((method) => `${method.name} is not here: ${method.missing}.`);
  if (!run.similar) axes.push(["similar", "similarity of the pictures"]);
  if (!axes.length) return { title: "Compare", nodes: [el("section", { class: "empty" }, el("h1", {}, "Nothing to compare"), absent.map((text) => el("p", {}, text)))] };
  const likeness = run.methods.findIndex((method) => /cosine|dino|clip|similar/.test(method.name) && !/gradient|output/.test(method.name));
  const last = !run.similar ? "similar" : axes.some(([axis]) => axis === `m${likeness}`) ? `m${likeness}` : axes.at(-1)[0];
  const known = (key, other) => (axes.some(([axis]) => axis === params.get(key)) ? params.get(key) : other);
  const [one, two = one] = axes.map(([axis]) => axis);
  const asked = { x: known("x", one), y: known("y", two), u: known("u", last), v: known("v", one), by: params.get("by") || "" };
  const loaded = new Map();
  const values = async (axis) => {
    if (!loaded.has(axis)) loaded.set(axis, axis === "similar" ? numbers(`api/${run.number}/similar/${row}`, signal) : numbers(`api/${run.number}/row/${row}/${axis.slice(1)}`, signal));
    return loaded.get(axis);
  };
  const n = run.train.count;
  const brushed = new Uint8Array(n);
  let colours = null;
  const list = el("ol", { class: "entries plain brushed" });
  const counted = el("p", { class: "counted", "aria-live": "polite" }, "Drag over the points, or focus a scatter and use the arrow keys.");
  const take = el("button", { type: "button", hidden: true, onclick: () => pick(run, rows(), true) }, "Add to the selection");
  const rows = () => [...brushed.keys()].filter((image) => brushed[image]);

  const left = new Scatter("x", "y", "Method against method");
  const right = new Scatter("u", "v", "Score against similarity");
  const both = [left, right];
  for (const one of both) one.onbrush = (box, from) => brush(one, box, from);

  async function load() {
    colours = asked.by === "" ? null : await integers(`api/${run.number}/codes/${asked.by}`, signal);
    await Promise.all(both.map(async (one) => one.load(await values(asked[one.a]), await values(asked[one.b]), named(asked[one.a]), named(asked[one.b]))));
    draw();
  }
  const named = (axis) => axes.find(([key]) => key === axis)[1];
  const draw = () => both.forEach((one) => one.draw(brushed, colours));

  let turn = 0;
  async function brush(one, box, done) {
    brushed.fill(0);
    let count = 0;
    if (box) for (let image = 0; image < n; image++) if (one.inside(image, box)) { brushed[image] = 1; count++; }
    for (const other of both) if (other !== one) other.box = null;
    draw();
    take.hidden = !count;
    take.textContent = `Add ${whole(count)} to the selection`;
    counted.textContent = box ? `${many(count, "image")} brushed${count > SHOWN ? `, the first ${SHOWN} by ${named(asked[one.b])}` : ""}` : "Drag over the points, or focus a scatter and use the arrow keys.";
    if (!done) return;
    const mine = ++turn;
    const found = rows().sort((a, b) => one.y[b] - one.y[a]).slice(0, SHOWN);
    const items = found.length ? await get(`api/${run.number}/some/train?rows=${found.join(",")}`, signal) : [];
    if (mine !== turn) return;
    list.replaceChildren(...items.map((item) => el("li", {}, el("a", { class: "entry", href: `#/${run.number}/image/${item.row}` },
      el("span", { class: "shot" }, picture(run, "train", item.row)),
      el("span", { class: "what" }, middle(item.name), el("span", { class: "about" }, `${number(one.x[item.row], 3)} · ${number(one.y[item.row], 3)}`))), pickButton(run, item.row, item.name))));
  }

  const pickAxis = (key, label) => choice(label, axes, asked[key], (value) => { asked[key] = value; set({ [key]: value }); for (const one of both) one.box = null; brush(left, null, true); load(); });
  const step = (by) => { const to = row + by; if (to >= 0 && to < run.queries.count) location.hash = `#/${run.number}/compare/${to}${location.hash.includes("?") ? `?${location.hash.split("?")[1]}` : ""}`; };
  const facets = run.train.facets.filter((facet) => facet.values.length > 1);
  const legend = el("ul", { class: "legend", "aria-label": "Colours" });
  const recolour = async (value) => {
    asked.by = value;
    set({ by: value });
    key();
    await load();
  };
  function key() {
    const facet = asked.by === "" ? null : run.train.facets[asked.by];
    legend.replaceChildren(...(facet ? facet.values.slice(0, 9).map((value) => el("li", { class: `hue${value.code % 9}` }, short(value.name, 22))) : []), ...(facet && facet.of > 9 ? [el("li", { class: "note" }, `colours repeat: ${whole(facet.of)} values`)] : []));
  }
  key();
  const redraw = () => draw();
  addEventListener("colours", redraw);
  const watching = new ResizeObserver(redraw);
  return {
    title: `Compare for ${about.name}`,
    nodes: [
      el("div", { class: "head" }, el("a", { class: "tiny", href: `#/${run.number}/picture/${row}`, "aria-label": `What each method says of ${about.name}` }, picture(run, "queries", row, { alt: `picture ${about.name}`, lazy: false })),
        el("h1", {}, "Compare"), el("p", { class: "counted" }, `for ${short(about.name, 40)}`),
        el("div", { class: "steps" }, el("button", { type: "button", onclick: () => step(-1), disabled: row === 0, "aria-label": "the picture before" }, "←"), el("span", {}, `${whole(row + 1)} of ${whole(run.queries.count)}`),
          el("button", { type: "button", onclick: () => step(1), disabled: row === run.queries.count - 1, "aria-label": "the picture after" }, "→"))),
      el("div", { class: "bar" }, facets.length > 0 && choice("Colour by", [["", "nothing"], ...facets.map((facet) => [run.train.facets.indexOf(facet), facet.column])], asked.by, recolour), legend),
      el("div", { class: "scatters" },
        el("section", { class: "card", "aria-label": left.title }, el("h2", {}, left.title), el("div", { class: "bar" }, pickAxis("y", "Up"), pickAxis("x", "Right")), left.node),
        el("section", { class: "card", "aria-label": right.title }, el("h2", {}, right.title), el("div", { class: "bar" }, pickAxis("v", "Up"), pickAxis("u", "Right")), right.node),
        el("section", { class: "card", "aria-label": "Brushed images" }, el("h2", {}, "Brushed images"), counted, take, list)),
      ...absent.map((text) => el("p", { class: "note" }, text)),
      run.similar && el("p", { class: "note" }, `No similarity of the pictures: ${run.similar}.`),
    ].filter(Boolean),
    shown: () => { for (const one of both) watching.observe(one.node); return load().catch((error) => { if (error.name !== "AbortError") counted.textContent = error.message; }); },
    close: () => { removeEventListener("colours", redraw); watching.disconnect(); },
    step,
  };
}

const LEFT = 62, BOTTOM = 38, TOP = 10, RIGHT = 12;

class Scatter {
  constructor(a, b, title) {
    Object.assign(this, { a, b, title, box: null });
    this.node = el("canvas", { class: "scatter", tabindex: "0", role: "img", "aria-label": title });
    this.node.addEventListener("pointerdown", (event) => this.down(event));
    this.node.addEventListener("keydown", (event) => this.key(event));
  }

  load(x, y, right, up) {
    Object.assign(this, { x, y, right, up });
    [this.x0, this.x1] = span(x);
    [this.y0, this.y1] = span(y);
    this.node.setAttribute("aria-label", `${this.title}: ${up} up, ${right} to the right. Arrow keys move a brush, with Shift they make it larger or smaller, Escape takes it away.`);
  }

  size() {
    const width = this.node.clientWidth;
    const height = Math.min(460, Math.max(260, Math.round(width * 0.72)));
    this.node.style.height = `${height}px`;
    const ratio = devicePixelRatio || 1;
    if (this.node.width !== Math.round(width * ratio) || this.node.height !== Math.round(height * ratio)) {
      this.node.width = Math.round(width * ratio);
      this.node.height = Math.round(height * ratio);
    }
    this.wide = width - LEFT - RIGHT;
    this.high = height - TOP - BOTTOM;
    return [width, height, ratio];
  }

  px(value) { return LEFT + this.wide * ((value - this.x0) / (this.x1 - this.x0)); }
  py(value) { return TOP + this.high * (1 - (value - this.y0) / (this.y1 - this.y0)); }
  vx(pixel) { return this.x0 + (this.x1 - this.x0) * ((pixel - LEFT) / this.wide); }
  vy(pixel) { return this.y0 + (this.y1 - this.y0) * (1 - (pixel - TOP) / this.high); }
  inside(image, [a, b, c, d]) { return this.x[image] >= a && this.x[image] <= b && this.y[image] >= c && this.y[image] <= d; }

  draw(brushed, colours) {
    if (!this.x || !this.node.isConnected) return;
    const [width, height, ratio] = this.size();
    const pen = this.node.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.axes(pen, colour);
    const n = this.x.length;
    const dot = n > 20000 ? 1.5 : n > 2000 ? 2.5 : 4;
    const some = brushed.includes(1);
    const hues = Array.from({ length: 9 }, (_, at) => colour(`--hue${at}`));
    for (const round of some ? [0, 1] : [0]) {
      pen.globalAlpha = some && !round ? 0.16 : n > 20000 ? 0.45 : 0.7;
      pen.fillStyle = colour(some && round ? "--ink" : "--dot");
      const side = dot + (round ? 1.5 : 0);
      for (let image = 0; image < n; image++) {
        const x = this.x[image], y = this.y[image];
        if (x !== x || y !== y || (some && brushed[image] !== round)) continue;
        if (colours) pen.fillStyle = hues[colours[image] % 9];
        if (n > 5000) pen.fillRect(this.px(x) - side / 2, this.py(y) - side / 2, side, side);
        else {
          pen.beginPath();
          pen.arc(this.px(x), this.py(y), side * 0.7, 0, 7);
          pen.fill();
        }
      }
    }
    pen.globalAlpha = 1;
    if (this.box) {
      const [a, b, c, d] = this.box;
      pen.strokeStyle = colour("--accent");
      pen.lineWidth = 1.5;
      pen.strokeRect(this.px(a), this.py(d), this.px(b) - this.px(a), this.py(c) - this.py(d));
    }
  }

  axes(pen, colour) {
    pen.font = "11px system-ui, sans-serif";
    pen.lineWidth = 1;
    pen.fillStyle = colour("--muted");
    pen.textBaseline = "middle";
    for (const tick of ticks(this.y0, this.y1, 8)) {
      pen.strokeStyle = colour(tick === 0 ? "--strong" : "--line");
      line(pen, LEFT, this.py(tick), LEFT + this.wide, this.py(tick));
      pen.textAlign = "right";
      pen.fillText(number(tick, 2), LEFT - 7, this.py(tick));
    }
    for (const tick of ticks(this.x0, this.x1, Math.max(2, Math.floor(this.wide / 90)))) {
      pen.strokeStyle = colour(tick === 0 ? "--strong" : "--line");
      line(pen, this.px(tick), TOP, this.px(tick), TOP + this.high);
      pen.textAlign = "center";
      pen.fillText(number(tick, 2), this.px(tick), TOP + this.high + 12);
    }
    pen.textAlign = "right";
    pen.fillText(`${this.right} →`, LEFT + this.wide, TOP + this.high + 29);
    pen.save();
    pen.translate(8, TOP);
    pen.rotate(-Math.PI / 2);
    pen.fillText(`${this.up} →`, 0, 0);
    pen.restore();
  }

  down(event) {
    const at = (moved) => { const { left, top } = this.node.getBoundingClientRect(); return [moved.clientX - left, moved.clientY - top]; };
    const [x, y] = at(event);
    this.node.setPointerCapture(event.pointerId);
    this.node.focus({ preventScroll: true });
    let last = null;
    const move = (moved) => {
      const [u, v] = at(moved);
      this.box = Math.abs(u - x) + Math.abs(v - y) < 5 ? null : [this.vx(Math.min(x, u)), this.vx(Math.max(x, u)), this.vy(Math.max(y, v)), this.vy(Math.min(y, v))];
      cancelAnimationFrame(last);
      last = requestAnimationFrame(() => this.onbrush(this.box, false));
    };
    const up = (moved) => {
      this.node.removeEventListener("pointermove", move);
      move(moved);
      cancelAnimationFrame(last);
      this.onbrush(this.box, true);
    };
    this.node.addEventListener("pointermove", move);
    this.node.addEventListener("pointerup", up, { once: true });
  }

  key(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (event.key === "Escape" && this.box) {
      this.box = null;
      this.onbrush(null, true);
    } else if (by) {
      const wide = (this.x1 - this.x0) / 20, high = (this.y1 - this.y0) / 20;
      const [a, b, c, d] = this.box || [this.x1 - 4 * wide, this.x1, this.y1 - 4 * high, this.y1];
      this.box = !this.box ? [a, b, c, d] : event.shiftKey ? [a, Math.max(a + wide / 2, b + by[0] * wide), c, Math.max(c + high / 2, d + by[1] * high)] : [a + by[0] * wide, b + by[0] * wide, c + by[1] * high, d + by[1] * high];
      this.onbrush(this.box, true);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

function line(pen, a, b, c, d) {
  pen.beginPath();
  pen.moveTo(Math.round(a) + 0.5, Math.round(b) + 0.5);
  pen.lineTo(Math.round(c) + 0.5, Math.round(d) + 0.5);
  pen.stroke();
}

function span(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  if (!(high > low)) return [Number.isFinite(low) ? low - 1 : -1, Number.isFinite(low) ? low + 1 : 1];
  const edge = (high - low) * 0.04;
  return [low - edge, high + edge];
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((one) => one * power >= rough) * power;
  const found = [];
  for (let tick = Math.ceil(low / step); tick * step <= high; tick++) found.push(tick * step || 0);
  return found;
}
