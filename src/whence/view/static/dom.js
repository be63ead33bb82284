// Elements, numbers, and what the server is asked. Every text is set as text: nothing here ever becomes markup.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "hidden" || name === "selected") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// A number for people: thousands separators, a true minus, powers of ten far from 1. As whence/report/words.py has it.
export function number(value, digits = 3, plus = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const [mantissa, power] = Math.abs(value).toExponential(digits - 1).split("e");
  const exponent = Number(power);
  const sign = value < 0 ? "−" : plus ? "+" : "";
  if (exponent >= -4 && exponent < 6) {
    const places = Math.max(0, digits - 1 - exponent);
    return sign + fixed(places).format(Number(`${mantissa}e${power}`));
  }
  const raised = String(exponent).replace(/./g, (letter) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(letter)]);
  return `${sign}${mantissa}×10${raised}`;
}

// To make one takes longer than to use it a hundred times.
const formats = [];
const fixed = (places) => (formats[places] ??= new Intl.NumberFormat("en", { minimumFractionDigits: places, maximumFractionDigits: places }));

export const whole = (value) => fixed(0).format(Number(value));
export const many = (count, one, more = `${one}s`) => `${whole(count)} ${count === 1 ? one : more}`;

// The end of a long name: folders repeat, file names tell.
export const short = (name, most = 34) => (name.length <= most ? name : `…${name.slice(1 - most)}`);

// A name of which the middle goes where there is no room: its end tells most.
export function middle(name, tail = 13) {
  const most = name.length > 90 ? short(name, 90) : name;
  return el("span", { class: "name", title: name }, most.length <= tail ? most : [el("span", { class: "start" }, most.slice(0, -tail)), el("span", { class: "end" }, most.slice(-tail))]);
}

export class Gone extends Error {}

async function asked(path, signal) {
  let answer;
  try {
    answer = await fetch(path, { signal, headers: { accept: "application/json" } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Gone("The viewer does not answer: was it stopped? Start `whence view` again.");
  }
  if (!answer.ok) throw new Gone(await answer.text());
  return answer;
}

const kept = new Map();

export async function get(path, signal) {
  if (kept.has(path)) return kept.get(path);
  const found = await (await asked(path, signal)).json();
  kept.set(path, found);
  if (kept.size > 60) kept.delete(kept.keys().next().value);
  return found;
}

export const numbers = async (path, signal) => new Float32Array(await (await asked(path, signal)).arrayBuffer());
export const integers = async (path, signal) => new Int32Array(await (await asked(path, signal)).arrayBuffer());

export const say = (text) => { $("live").textContent = text; };

// A picture of a run, or what stands in its place.
export function picture(run, side, row, { size = "thumb", alt = "", lazy = true } = {}) {
  if (!run[side].pictures) return missing(alt, "the pictures are not there", size === "picture");
  const source = `${size}/${run.number}/${side}/${row}`;
  const image = el("img", { src: source, alt, loading: lazy ? "lazy" : "eager", decoding: "async", draggable: "false" });
  image.addEventListener("error", async () => {
    let why = "it cannot be shown";
    if (size === "picture") why = await fetch(source).then((answer) => answer.text()).catch(() => why);
    image.replaceWith(missing(alt, why, size === "picture"));
  });
  return image;
}

function missing(alt, why, told = false) {
  return el("span", { class: "missing", role: "img", "aria-label": `${alt || "picture"}: ${why}`, title: why }, told ? why : "no picture");
}

export function save(name, text, kind) {
  const address = URL.createObjectURL(new Blob([text], { type: `${kind};charset=utf-8` }));
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
    return true;
  } catch {
    say("It could not be copied; select the text and copy it yourself");
    return false;
  }
}

// A select with a label that is seen.
export function choice(label, options, value, change, more = {}) {
  const id = more.id || `choice-${(choices += 1)}`;
  const select = el("select", { ...more, id, onchange: () => change(select.value) },
    options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(value) }, text)));
  return el("div", { class: "field" }, el("label", { for: id }, label), select);
}

let choices = 0;
