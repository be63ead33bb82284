// The training images that a person picked, per run, for as long as the tab is open.

import { el, get, say, many } from "./dom.js";

const changed = new Set();
const sets = new Map();

const key = (run) => `picked:${run.root}`;

export function picked(run) {
  if (!sets.has(run.number)) {
    let rows = [];
    try {
      rows = JSON.parse(sessionStorage.getItem(key(run)) || "[]").filter((row) => Number.isInteger(row) && row < run.train.count);
    } catch { /* of another version, or full */ }
    sets.set(run.number, new Set(rows));
  }
  return sets.get(run.number);
}

export function pick(run, rows, on, told = true) {
  const set = picked(run);
  for (const row of rows) on ? set.add(row) : set.delete(row);
  try {
    sessionStorage.setItem(key(run), JSON.stringify([...set]));
  } catch { /* it holds while the page is open */ }
  if (told) say(`${many(set.size, "image")} in the selection`);
  for (const listener of changed) listener(run);
}

export function whenPicked(listener) {
  changed.add(listener);
  return () => changed.delete(listener);
}

// The button that puts one image into the selection, or takes it out.
export function pickButton(run, row, name) {
  const button = el("button", { type: "button", class: "pick", "data-pick": row, onclick: (event) => {
    event.preventDefault();
    event.stopPropagation();
    pick(run, [row], !picked(run).has(row));
  } });
  const show = () => {
    const on = picked(run).has(row);
    button.setAttribute("aria-pressed", String(on));
    button.setAttribute("aria-label", `${on ? "In the selection" : "Select"}: ${name}`);
    button.textContent = on ? "✓" : "+";
  };
  show();
  button.show = show;
  return button;
}

whenPicked(() => {
  for (const button of document.querySelectorAll("button.pick")) button.show?.();
});

// ---------------------------------------------------------------------------------------------------------- what is saved

// A cell that a spreadsheet does not take for a formula, and quotes where they are needed.
export function cell(value) {
  if (value === null || value === undefined) return "";
  let text = typeof value === "object" ? JSON.stringify(value) : String(value);
  if (typeof value !== "number" && /^[\s"']*[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) || text !== text.trim() ? `"${text.replaceAll('"', '""')}"` : text;
}

export async function exact(run, rows, query) {
  const found = [];
  for (let start = 0; start < rows.length; start += 300) {
    const some = rows.slice(start, start + 300).join(",");
    found.push(...await get(`api/${run.number}/exact?rows=${some}${query === null ? "" : `&query=${query}`}`));
  }
  return found;
}

export function csv(images, methods) {
  const columns = [...new Set(images.flatMap((image) => Object.keys(image.columns)))];
  const scored = images.some((image) => image.scores) ? methods : [];
  const head = ["image", ...columns, ...scored.flatMap((name) => [`score ${name}`, `rank ${name}`])];
  const lines = images.map((image) => [
    image.name,
    ...columns.map((name) => image.columns[name]),
    ...scored.flatMap((name) => [image.scores?.[name]?.score, image.scores?.[name]?.rank]),
  ]);
  return [head, ...lines].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
}

// What a shell takes for one word. Control characters are written as it reads them.
export function quoted(text) {
  if (/^[\w.,:=@%+/-]+$/.test(text)) return text;
  if (/[\u0000-\u001f\u007f]/.test(text)) {
    const escaped = text.replace(/[\\']/g, "\\$&").replace(/[\u0000-\u001f\u007f]/g, (letter) => `\\x${letter.charCodeAt(0).toString(16).padStart(2, "0")}`);
    return `$'${escaped}'`;
  }
  return `'${text.replaceAll("'", "'\\''")}'`;
}

export const without = (images) => images.map((image) => `--without ${quoted(`id=${image.name}`)}`).join(" ");
