// The training images that were picked, and how to take them along: a table, a list of files, a command line.

import { choice, copy, el, get, many, middle, picture, save, say, whole } from "./dom.js";
import { csv, exact, pick, pickButton, picked, quoted, whenPicked, without } from "./picked.js";

const SHOWN = 200;

export async function selection({ run, signal }) {
  const count = el("p", { class: "counted" });
  const list = el("ol", { class: "entries plain wide" });
  const command = el("textarea", { id: "command", readonly: true, rows: "6", spellcheck: "false", "aria-label": "Command line that leaves these images out" });
  const holder = el("div", {});
  let query = "";
  const last = sessionStorage.getItem(`query:${run.root}`);
  const rows = () => [...picked(run)].sort((a, b) => a - b);
  const named = (kind) => `whence-selection.${kind}`;
  const methods = run.methods.map((method) => method.name);

  const table = async () => {
    const found = await exact(run, rows(), query === "" ? null : Number(query));
    save(named("csv"), csv(found, methods), "text/csv");
    say(`Saved a table of ${many(found.length, "image")}`);
  };
  const files = async () => {
    const found = await exact(run, rows(), null);
    save(named("txt"), found.map((image) => `${image.name}\n`).join(""), "text/plain");
    say(`Saved a list of ${many(found.length, "file")}`);
  };

  async function fill() {
    const all = rows();
    count.textContent = many(all.length, "training image");
    holder.replaceChildren(all.length ? body : el("div", { class: "empty" }, el("p", {}, "Nothing is selected yet."),
      el("p", {}, "+ beside an image selects it, x the one that has the focus; a wall, a group and a brush select all of theirs.")));
    if (!all.length) return;
    const items = await get(`api/${run.number}/some/train?rows=${all.slice(0, SHOWN).join(",")}`, signal);
    list.replaceChildren(...items.map((item) => el("li", {}, el("a", { class: "entry", href: `#/${run.number}/image/${item.row}` },
      el("span", { class: "shot" }, picture(run, "train", item.row)), el("span", { class: "what" }, middle(item.name), el("span", { class: "about" }, item.label || item.caption))),
    pickButton(run, item.row, item.name))));
    rest.textContent = all.length > SHOWN ? `The first ${SHOWN}; ${whole(all.length - SHOWN)} more are in the files.` : "";
    const some = await exact(run, all.slice(0, SHOWN), null);
    const model = run.model ? quoted(run.model) : "MODEL";
    const folder = run.train.folder ? quoted(run.train.folder) : "IMAGES";
    command.value = `whence preview ${model} --train_data_dir ${folder} ${without(some)}`;
    more.textContent = all.length > SHOWN ? `Of the first ${SHOWN} only: a command of ${whole(all.length)} images is too long for a shell.` : "The model's pictures as they would be without these images. `--without` is the same for every verb that has it.";
  }

  const more = el("p", { class: "note" });
  const rest = el("p", { class: "note" });
  const body = el("div", { class: "take" },
    el("section", { class: "card", "aria-label": "Take along" }, el("h2", {}, "Take along"),
      el("div", { class: "bar" },
        choice("Scores for", [["", "no picture"], ...(last === null ? [] : [[last, `picture ${Number(last) + 1}, looked at last`]])], "", (value) => { query = value; }),
        el("button", { type: "button", class: "main", onclick: table }, "Table (CSV)"), el("button", { type: "button", onclick: files }, "List of files"),
        el("button", { type: "button", onclick: () => pick(run, rows(), false) }, "Empty the selection")),
      el("h2", {}, el("label", { for: "command" }, "Without them")), command, el("div", { class: "bar" }, el("button", { type: "button", onclick: () => copy(command.value) }, "Copy the command")), more),
    list, rest);
  const stop = whenPicked(fill);
  await fill();
  return { title: "Selection", nodes: [el("div", { class: "head" }, el("h1", {}, "Selection"), count), holder], close: stop };
}
