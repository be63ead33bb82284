// The frame around the views: addresses, navigation, keys, colours.

import { $, Gone, el, get, many, say, choice, copy, whole } from "./dom.js";
import { picked, whenPicked } from "./picked.js";
import { images, pictures, groups } from "./walls.js";
import { query } from "./query.js";
import { group, image } from "./pushed.js";
import { compare } from "./compare.js";
import { selection } from "./selection.js";

const VIEWS = { pictures, images, groups, picture: query, image, group, compare, selection };
const TABS = [["pictures", "Pictures"], ["images", ""], ["groups", "Groups"], ["compare", "Compare"], ["selection", "Selection"]];
const PARENT = { picture: "pictures", image: "images", group: "groups" };

let runs = [];
let open = null; // the view that is shown
let first = true;
let framed = {}; // the run and the tab that the frame is of
const scrolled = new Map();

function place() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [number = "0", name = "pictures", ...rest] = path.split("/").filter(Boolean);
  return { number: Number(number) || 0, name, rest, params: new URLSearchParams(search) };
}

export async function show() {
  const { number, name, rest, params } = place();
  const run = runs[number] || runs[0];
  if (open) {
    scrolled.set(open.hash, scrollY);
    open.close?.();
    open.stop.abort();
  }
  const view = VIEWS[name] || VIEWS.pictures;
  const here = { hash: location.hash, stop: new AbortController() };
  open = here;
  const main = $("main");
  main.setAttribute("aria-busy", "true");
  // A browser asks for six things at once: what is asked now would wait for the pictures of a page that nobody looks at any more.
  for (const image of main.querySelectorAll("img")) if (!image.complete) image.removeAttribute("src");
  try {
    const making = view({ run, runs, rest, params, signal: here.stop.signal, set: (more) => set(here, more) });
    frame(run, PARENT[name] || (name in VIEWS ? name : "pictures")); // while the server works
    const made = await making;
    if (open !== here) return made.close?.();
    Object.assign(here, made);
    document.title = `${made.title} · ${run.title} · whence`;
    main.replaceChildren(...made.nodes);
    compareLast(run);
    made.shown?.();
    scrollTo(0, scrolled.get(here.hash) || 0);
    const heading = main.querySelector("h1");
    if (heading && !first && !made.keep) {
      heading.tabIndex = -1;
      heading.focus({ preventScroll: true });
    }
    first = false;
  } catch (error) {
    if (error.name === "AbortError" || open !== here) return;
    if (!(error instanceof Gone)) console.error(error);
    main.replaceChildren(el("section", { class: "empty" }, el("h1", {}, "Nothing to show"), el("p", {}, error.message),
      el("p", {}, el("a", { href: `#/${run.number}/pictures` }, "Back to the pictures"))));
  } finally {
    main.removeAttribute("aria-busy");
  }
}

// A view changes what its address says, without becoming another page.
function set(here, more) {
  if (open !== here) return;
  const { number, name, rest, params } = place();
  for (const [key, value] of Object.entries(more)) value === "" || value === null ? params.delete(key) : params.set(key, value);
  const search = params.toString();
  history.replaceState(null, "", `#/${[number, name, ...rest].join("/")}${search ? `?${search}` : ""}`);
  here.hash = location.hash;
}

// Made anew where it says something else: to measure it lays out the whole page.
function frame(run, tab) {
  if (framed.run === run && framed.tab === tab) return;
  framed = { run, tab };
  document.querySelector(".mark").href = `#/${run.number}/pictures`;
  $("which").replaceChildren(runs.length > 1
    ? choice("Run", runs.map((one) => [one.number, one.title]), run.number, (value) => { location.hash = `#/${value}/pictures`; }, { id: "runs" })
    : el("span", { class: "title", title: run.title }, run.title));
  $("nav").replaceChildren(...TABS.filter(([name]) => name !== "groups" || run.train.facets.length).map(([name, text]) => {
    const count = name === "selection" ? el("span", { class: "count" }, whole(picked(run).size)) : null;
    return el("a", { href: `#/${run.number}/${name}`, "aria-current": name === tab ? "page" : null, "data-tab": name }, text || run.who, count);
  }));
  const tabbed = $("nav").querySelector("[aria-current]"); // by hand: scrollIntoView would move where Tab begins
  if (tabbed) $("nav").scrollLeft = tabbed.offsetLeft - $("nav").offsetLeft - ($("nav").clientWidth - tabbed.offsetWidth) / 2;
  const signed = run.methods.some((method) => method.signed);
  $("law").textContent = `${signed ? "Positive = proponent: the image pushed the model towards this picture. " : ""}Scores are estimates of influence, not proof of copying. Compare scores of one picture and one method only.`;
  $("root").textContent = run.root;
  $("facts").replaceChildren(...(run.facts.length ? [el("summary", {}, "About this run"), el("dl", { class: "facts" }, run.facts.map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]))] : []));
  told(run);
}

// Compare is of the picture that was looked at last.
function compareLast(run) {
  $("nav").querySelector('[data-tab="compare"]').href = `#/${run.number}/compare/${lastQuery(run)}`;
}

whenPicked((run) => {
  const count = document.querySelector('[data-tab="selection"] .count');
  if (count) count.textContent = whole(picked(run).size);
});

export function lastQuery(run) {
  return Number(sessionStorage.getItem(`query:${run.root}`)) || 0;
}

// What a reader must know of a run, and a field for images that moved.
function told(run) {
  const box = $("told");
  if (box.dataset.run === String(run.number)) return;
  box.dataset.run = run.number;
  box.replaceChildren();
  if (!run.told.length) return;
  const moved = run.train.moved || run.queries.moved;
  const command = el("output", { class: "command" });
  const write = (where) => { command.textContent = `whence view ${run.root} --images ${where ? (/^[\w./-]+$/.test(where) ? where : `'${where.replaceAll("'", "'\\''")}'`) : "FOLDER"}`; };
  write("");
  box.append(el("aside", { class: "notice", "aria-label": "About this run" },
    el("ul", {}, run.told.map((line) => el("li", {}, line))),
    moved && el("div", { class: "moved" },
      el("label", { class: "field" }, el("span", {}, "Where are the images now?"), el("input", { type: "text", autocomplete: "off", spellcheck: "false", oninput: (event) => write(event.target.value.trim()) })),
      command, el("button", { type: "button", onclick: () => copy(command.textContent) }, "Copy"))));
}

// ------------------------------------------------------------------------------------------------------------- keys

const KEYS = [
  ["/", "search"], ["← → ↑ ↓", "move on a wall; on a picture, the one before or after"], ["Enter", "open"],
  ["p i g c s", "pictures, training images, groups, compare, selection"], ["x", "select the image, or take it out"],
  ["Esc", "close, clear, or back to the wall"], ["t", "light or dark"], ["?", "this"],
];
const WORDS = [
  ["Score", "How much a training image did for a picture, by one method. Larger = it did more. Compare within one picture and one method."],
  ["Proponent, opponent", "Above zero: the image pushed the model towards the picture. Below zero: away from it. Methods without a sign say how much alone."],
  ["Whisker", "One standard error on either side: what another run of the method would change by chance."],
  ["May rank a–b", "The ranks that such another run could give (99 % sure of each pair)."],
  ["Reliability", "The correlation to be expected between two such runs, 0 to 1. Below 0.5 the scores depend mostly on what was drawn for them."],
  ["Agreement", "Spearman's rank correlation of two methods over all images that both scored, and how many of their first ten they share."],
];

function help() {
  const dialog = $("keys");
  dialog.replaceChildren(el("h2", { id: "keys-title" }, "Keys and words"),
    el("dl", { class: "keys" }, KEYS.map(([key, text]) => [el("dt", {}, key.split(" ").flatMap((part) => [el("kbd", {}, part), " "])), el("dd", {}, text)])),
    el("dl", { class: "words" }, WORDS.map(([word, text]) => [el("dt", {}, word), el("dd", {}, text)])),
    el("button", { type: "button", onclick: () => dialog.close() }, "Close"));
  dialog.showModal();
}

const THEMES = ["", "light", "dark"];
const SAID = { "": "as the system has them", light: "light", dark: "dark" };

function colours(theme) {
  theme ? (document.documentElement.dataset.theme = theme) : delete document.documentElement.dataset.theme;
  $("theme").setAttribute("aria-label", `Colours: ${SAID[theme]}`);
  $("theme").textContent = { "": "◐", light: "○", dark: "●" }[theme];
  try { localStorage.setItem("theme", theme); } catch { /* for this page alone */ }
  dispatchEvent(new Event("colours"));
}

function turn() {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "") + 1) % 3];
  colours(next);
  say(`Colours: ${SAID[next]}`);
}

function writing(node) {
  return node.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable]");
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.key === "Escape") return escape(event);
  if (writing(event.target)) return;
  const { number, name } = place();
  const tab = { p: "pictures", i: "images", g: "groups", c: "compare", s: "selection" }[event.key];
  if (event.key === "?") help();
  else if (event.key === "t") turn();
  else if (event.key === "/") search(number);
  else if (tab) document.querySelector(`[data-tab="${tab}"]`)?.click();
  else if (event.key === "x") under()?.click();
  else if (open?.step && (event.key === "ArrowRight" || event.key === "ArrowLeft") && !event.target.closest("canvas")) open.step(event.key === "ArrowRight" ? 1 : -1);
  else return;
  event.preventDefault();
});

// The button of the image that has the focus, or is pointed at.
function under() {
  const near = document.activeElement.closest("li, .subject") || document.querySelector("li:hover");
  return near?.querySelector("button.pick") || document.querySelector(".subject button.pick");
}

function escape(event) {
  const field = writing(event.target);
  if (field?.matches("input[type=search]") && field.value) {
    field.value = "";
    field.dispatchEvent(new Event("input"));
  } else if (field) field.blur();
  else {
    const { number, name } = place();
    if (name in PARENT) location.hash = back(number, PARENT[name]);
    else return;
  }
  event.preventDefault();
}

// The wall as it was left, with its search.
function back(number, wall) {
  const known = [...scrolled.keys()].reverse().find((hash) => hash.startsWith(`#/${number}/${wall}`));
  return known || `#/${number}/${wall}`;
}

function search(number) {
  const field = document.querySelector("input[type=search]");
  if (field) return field.focus();
  location.hash = `#/${number}/pictures`;
  addEventListener("searchable", () => document.querySelector("input[type=search]")?.focus(), { once: true });
}

// ------------------------------------------------------------------------------------------------------------ begin

$("help").addEventListener("click", help);
$("theme").addEventListener("click", turn);
$("skip").addEventListener("click", () => $("main").focus());
addEventListener("hashchange", show);
// What was asked for by a view that is left, or by a button when the viewer was stopped.
addEventListener("unhandledrejection", (event) => {
  if (event.reason?.name === "AbortError") event.preventDefault();
  else if (event.reason instanceof Gone) {
    event.preventDefault();
    say(event.reason.message);
  }
});
history.scrollRestoration = "manual";
let theme = "";
try { theme = localStorage.getItem("theme") || ""; } catch { /* as the system has it */ }
colours(THEMES.includes(theme) ? theme : "");

get("api/runs").then((found) => {
  runs = found.map((run, number) => ({ ...run, number }));
  return show();
}).then(() => say(`${many(runs.length, "run")} open`), (error) => $("main").replaceChildren(el("p", { class: "empty" }, error.message)));
