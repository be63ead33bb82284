// A wall of a hundred thousand images, of which those on the screen exist: rows of tiles, placed by hand.

import { el, get, middle, picture } from "./dom.js";
import { pickButton } from "./picked.js";

const PAGE = 100;
const GAP = 14;

export class Grid {
  // list: { path(start, limit), count }; open: row -> address; label: what the list is called.
  constructor({ run, side, count, path, address, label, small = 132, text = 46 }) {
    Object.assign(this, { run, side, count, path, address, label, small, text });
    this.pages = new Map();
    this.tiles = new Map();
    this.active = 0;
    this.node = el("ul", { class: "grid", role: "list", "aria-label": label, onkeydown: (event) => this.key(event) });
    this.again = () => requestAnimationFrame(() => this.draw());
    this.observer = new ResizeObserver(this.again);
    this.observer.observe(this.node);
    addEventListener("scroll", this.again, { passive: true });
  }

  close() {
    this.closed = true;
    this.observer.disconnect();
    removeEventListener("scroll", this.again);
  }

  measure() {
    const width = this.node.clientWidth;
    this.columns = Math.max(2, Math.floor((width + GAP) / (this.small + GAP)));
    this.side_ = (width - GAP * (this.columns - 1)) / this.columns;
    this.high = this.side_ + this.text + GAP;
    this.node.style.height = `${Math.ceil(this.count / this.columns) * this.high}px`;
  }

  draw() {
    if (this.closed || !this.node.isConnected) return;
    this.measure();
    const top = this.node.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor((-top - 300) / this.high)) * this.columns;
    const last = Math.min(this.count, Math.ceil((innerHeight - top + 300) / this.high) * this.columns);
    const wanted = new Set();
    for (let place = first; place < last; place++) wanted.add(place);
    if (this.count) wanted.add(this.active); // what has the focus stays
    for (const [place, tile] of this.tiles) {
      if (wanted.has(place)) continue;
      tile.remove();
      this.tiles.delete(place);
    }
    for (const place of [...wanted].sort((a, b) => a - b)) {
      if (!this.tiles.has(place)) this.put(place);
      const tile = this.tiles.get(place);
      const column = place % this.columns;
      const row = Math.floor(place / this.columns);
      tile.style.width = `${this.side_}px`;
      tile.style.transform = `translate(${column * (this.side_ + GAP)}px, ${row * this.high}px)`;
    }
  }

  put(place) {
    const tile = el("li", { class: "tile", "aria-setsize": this.count, "aria-posinset": place + 1 });
    this.tiles.set(place, tile);
    const after = [...this.tiles.keys()].filter((other) => other > place).sort((a, b) => a - b)[0];
    this.node.insertBefore(tile, after === undefined ? null : this.tiles.get(after)); // read in their order
    tile.append(el("a", { class: "hold", tabindex: "-1", "aria-label": "loading" }));
    this.page(Math.floor(place / PAGE)).then((items) => this.show(tile, place, items[place % PAGE]), () => tile.classList.add("lost"));
  }

  page(number) {
    if (!this.pages.has(number)) {
      this.pages.set(number, get(this.path(number * PAGE, PAGE)).then((found) => found.items));
    }
    return this.pages.get(number);
  }

  show(tile, place, item) {
    if (!item || !tile.isConnected) return;
    const focused = tile.contains(document.activeElement);
    const about = item.caption || item.label;
    const link = el("a", { class: "hold", href: this.address(item.row), tabindex: place === this.active ? "0" : "-1", "data-place": place, "aria-label": [item.name, about, item.warned && "looks like a copy"].filter(Boolean).join(", ") },
      el("span", { class: "shot" }, picture(this.run, this.side, item.row), item.warned && el("span", { class: "flag" }, "copy?")),
      middle(item.name), el("span", { class: "about" }, about || "\u00a0"));
    link.addEventListener("focus", () => this.focused(place));
    tile.replaceChildren(link);
    if (this.side === "train") tile.append(pickButton(this.run, item.row, item.name));
    for (const button of tile.querySelectorAll("button")) button.tabIndex = place === this.active ? 0 : -1;
    if (focused) link.focus({ preventScroll: true });
  }

  focused(place) {
    const old = this.tiles.get(this.active);
    for (const one of old?.querySelectorAll("a, button") || []) one.tabIndex = -1;
    this.active = place;
    for (const one of this.tiles.get(place)?.querySelectorAll("a, button") || []) one.tabIndex = 0;
  }

  async move(place) {
    if (place < 0 || place >= this.count) return;
    this.focused(place);
    this.draw();
    const high = Math.floor(place / this.columns) * this.high;
    const top = this.node.getBoundingClientRect().top + scrollY + high;
    if (top < scrollY + 130) scrollTo(0, top - 130);
    else if (top + this.high > scrollY + innerHeight) scrollTo(0, top + this.high - innerHeight + 8);
    await this.page(Math.floor(place / PAGE));
    this.draw();
    const link = this.tiles.get(place)?.querySelector("a");
    this.focused(place);
    link?.focus({ preventScroll: true });
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.tagName === "BUTTON") return;
    const page = Math.max(1, Math.floor((innerHeight - 150) / this.high)) * this.columns;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns, PageDown: page, PageUp: -page };
    let place = event.key in steps ? this.active + steps[event.key] : event.key === "Home" ? 0 : event.key === "End" ? this.count - 1 : null;
    if (place === null) return;
    event.preventDefault();
    event.stopPropagation();
    if (Math.abs(steps[event.key] || 0) > 1) place = Math.min(Math.max(place, this.active % this.columns), this.count - 1);
    this.move(place);
  }
}
