// The walls: pictures that are explained, training images, and the groups that these belong to.

import { choice, el, get, many, say, short, whole } from "./dom.js";
import { Grid } from "./grid.js";
import { pick } from "./picked.js";

export const pictures = (view) => wall(view, "queries");
export const images = (view) => wall(view, "train");

async function wall({ run, params, set, signal }, side) {
  const about = run[side];
  const heading = side === "queries" ? "Pictures" : run.who;
  const holder = el("div", { class: "wall" });
  const counted = el("p", { class: "counted" });
  let grid = null;
  let turn = 0;

  const asked = () => {
    const found = new URLSearchParams();
    for (const [key, value] of params) if (/^(words|sort|c\d+)$/.test(key)) found.set(key, value);
    return found;
  };

  async function fill(announce) {
    const mine = ++turn;
    const wanted = asked().toString();
    const path = (start, limit) => `api/${run.number}/list/${side}?${wanted}&start=${start}&limit=${limit}`;
    holder.setAttribute("aria-busy", "true");
    const { count } = await get(path(0, 100), signal);
    if (mine !== turn) return;
    holder.removeAttribute("aria-busy");
    grid?.close();
    const address = (row) => `#/${run.number}/${side === "queries" ? "picture" : "image"}/${row}`;
    grid = new Grid({ run, side, count, path, address, label: heading });
    const all = about.count;
    counted.textContent = count === all ? many(all, side === "queries" ? "picture" : "image") : `${whole(count)} of ${many(all, side === "queries" ? "picture" : "image")}`;
    if (announce) say(counted.textContent);
    holder.replaceChildren(count ? grid.node : el("p", { class: "empty" }, "Nothing fits. ", el("button", { type: "button", onclick: clear }, "Clear search and filters")));
    grid.draw();
    every.hidden = side !== "train" || !count;
    every.textContent = count === all ? "Select all" : `Select these ${whole(count)}`;
  }

  function change(more) {
    for (const [key, value] of Object.entries(more)) value === "" ? params.delete(key) : params.set(key, value);
    set(more);
    return fill(true);
  }

  function clear() {
    const none = Object.fromEntries([...params.keys()].map((key) => [key, ""]));
    for (const field of bar.querySelectorAll("select, input")) field.value = "";
    change(none);
    bar.querySelector("input").focus();
  }

  let wait = 0;
  const search = el("input", { type: "search", value: params.get("words") || "", placeholder: "name, caption, creator …", "aria-keyshortcuts": "/", autocomplete: "off", spellcheck: "false", maxlength: "200",
    oninput: (event) => { clearTimeout(wait); wait = setTimeout(() => change({ words: event.target.value.trim() }), 140); } });
  const every = el("button", { type: "button", hidden: true, onclick: async () => pick(run, await get(`api/${run.number}/rows/${side}?${asked()}`, signal), true) }, "Select all");
  const sorts = [["", "Order of the run"], ["name", "Name"], ...(about.caption ? [["caption", "Caption"]] : []),
    ...(side === "train" ? run.methods.filter((method) => !(method.kept < 10 && method.missing)).map((method) => [`often:${method.name}`, `Often among the first ten: ${method.name}`]) : run.methods.filter((method) => method.leaning).map((method) => [`leaning:${method.name}`, `Leans on few images: ${method.name}`]))];
  const bar = el("form", { class: "bar", role: "search", "aria-label": heading, onsubmit: (event) => event.preventDefault() },
    el("label", { class: "field wide" }, el("span", {}, "Search"), search),
    about.facets.map((facet, number) => facet.values.length > 1 && choice(facet.column, [["", "all"], ...facet.values.map((value) => [value.code, `${value.name} (${whole(value.images)})`])], params.get(`c${number}`) || "", (value) => change({ [`c${number}`]: value }))),
    choice("Sort", sorts, params.get("sort") || "", (value) => change({ sort: value })),
    every);
  await fill(false);
  return {
    title: heading,
    nodes: [el("div", { class: "head" }, el("h1", {}, heading), counted), bar, holder],
    shown: () => { grid.draw(); dispatchEvent(new Event("searchable")); },
    close: () => grid?.close(),
  };
}

export async function groups({ run, params, set }) {
  const facets = run.train.facets;
  const holder = el("div", { class: "tablewrap", tabindex: "0", role: "region", "aria-label": "Groups" });
  let column = Math.min(Number(params.get("by")) || 0, facets.length - 1);
  let sort = params.get("sort") || "images";

  function fill() {
    const facet = facets[column];
    const values = [...facet.values].sort((a, b) => (sort === "name" ? 0 : b.images - a.images));
    const most = Math.max(...facet.values.map((value) => value.images));
    const head = (key, text) => el("th", { scope: "col", "aria-sort": sort === key ? (key === "name" ? "ascending" : "descending") : "none" },
      el("button", { type: "button", class: "sort", onclick: () => { sort = key; set({ sort: key }); fill(); } }, text));
    holder.replaceChildren(el("table", { class: "groups" },
      el("thead", {}, el("tr", {}, head("name", facet.column), head("images", "images"), el("td", {}))),
      el("tbody", {}, values.map((value) => el("tr", {},
        el("th", { scope: "row" }, el("a", { href: `#/${run.number}/group/${column}/${value.code}`, title: value.name }, short(value.name, 60))),
        el("td", { class: "num" }, whole(value.images)),
        el("td", { class: "wide" }, el("meter", { min: 0, max: most, value: value.images, "aria-hidden": "true" })))))),
      facet.of > facet.values.length ? el("p", { class: "note" }, `The ${whole(facet.values.length)} with most images, of ${whole(facet.of)}.`) : "");
  }

  fill();
  return {
    title: "Groups",
    nodes: [el("div", { class: "head" }, el("h1", {}, "Groups"), el("p", { class: "counted" }, "of training images")),
      el("div", { class: "bar" }, choice("By", facets.map((facet, number) => [number, facet.column]), column, (value) => { column = Number(value); set({ by: value }); fill(); })), holder],
  };
}
