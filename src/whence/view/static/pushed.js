// The other way round: a training image, or a group of them, and every picture it had a part in.

import { el, get, many, middle, number, picture, short, whole } from "./dom.js";
import { Scale, scoreText } from "./bars.js";
import { Grid } from "./grid.js";
import { pick } from "./picked.js";
import { about, sentence, subject } from "./query.js";

const FIRST = 12;
const MORE = 60;

export async function image({ run, rest, signal }) {
  const row = Number(rest[0]);
  const found = await get(`api/${run.number}/image/${row}`, signal);
  const step = (by) => { const to = row + by; if (to >= 0 && to < run.train.count) location.hash = `#/${run.number}/image/${to}`; };
  return {
    title: found.image.name,
    nodes: [el("div", { class: "split" }, subject(run, "train", found.image, step, []),
      el("div", { class: "flow" }, el("p", { class: "lead" }, "The pictures that it had a part in, those first in which it ranks highest among all training images. Scores of different pictures are not compared with each other."),
        el("div", { class: "methods" }, await Promise.all(found.methods.map((told, at) => column(run, told, run.methods[at], "image", signal))))))],
    step,
  };
}

export async function group({ run, rest, signal }) {
  const [at, code] = rest.map(Number);
  const found = await get(`api/${run.number}/group/${at}/${code}`, signal);
  const path = (start, limit) => `api/${run.number}/list/train?c${at}=${code}&start=${start}&limit=${limit}`;
  const grid = new Grid({ run, side: "train", count: found.images, path, address: (row) => `#/${run.number}/image/${row}`, label: `Training images of ${short(found.name, 60)}`, small: 112 });
  const every = el("button", { type: "button", onclick: async () => pick(run, await get(`api/${run.number}/rows/train?c${at}=${code}`, signal), true) }, `Select all ${whole(found.images)}`);
  return {
    title: found.name,
    nodes: [
      el("div", { class: "head" }, el("p", { class: "over" }, found.column), el("h1", { class: "file" }, found.name), el("p", { class: "counted" }, many(found.images, "training image"))),
      el("div", { class: "bar" }, every),
      el("p", { class: "lead" }, `The pictures that its images had a part in together: sums of their scores, those first in which it ranks highest among all ${found.column} values. A sum, not a Shapley value: it ignores how images work together, and more images have larger sums.`),
      el("div", { class: "methods" }, await Promise.all(found.methods.map((told, number) => column(run, told, run.methods[number], "group", signal)))),
      el("h2", {}, "Its images"), grid.node,
    ],
    shown: () => grid.draw(),
    close: () => grid.close(),
  };
}

async function column(run, told, method, kind, signal) {
  const id = `p-${method.name.replace(/\W/g, "-")}`;
  const card = el("section", { class: "card method", "aria-labelledby": id }, el("header", {}, el("h2", { id, title: `${method.sign}. ${method.scale}` }, method.name)));
  const why = kind === "image" ? (told.scored ? "" : sentence(told.why)) : told.why && `No sums: ${told.why}.`;
  if (why) {
    card.append(el("p", { class: "note" }, why));
    return card;
  }
  const entries = told.queries.map((query, at) => ({ query, score: told.score[at], stderr: told.stderr?.[at], rank: told.rank[at] }));
  const best = entries.filter((entry) => entry.rank <= told.first).length;
  card.querySelector("header").append(el("p", { class: "sure" }, kind === "image" ? `Among the first ${told.first === 10 ? "ten" : told.first} of ${many(told.all, "picture")}: ${whole(best)}.` : `Ranks first for ${whole(entries.filter((entry) => entry.rank === 1).length)} of ${many(told.all, "picture")}.`));
  const list = el("ol", { class: "entries" });
  const next = el("button", { type: "button", class: "next", onclick: () => grow(MORE) }, "Show more");
  const scale = new Scale(entries);
  let shown = 0;
  async function grow(by) {
    const some = entries.slice(shown, shown + by);
    const items = some.length ? await get(`api/${run.number}/some/queries?rows=${some.map((entry) => entry.query).join(",")}`, signal) : [];
    list.append(...some.map((entry, at) => {
      const item = items[at];
      return el("li", {}, el("a", { class: "entry", href: `#/${run.number}/picture/${entry.query}`, "aria-label": `${item.name}: rank ${entry.rank} of ${told.of}, ${kind === "image" ? "score" : "sum"} ${scoreText(entry, method.signed)}` },
        el("span", { class: "shot" }, picture(run, "queries", entry.query)),
        el("span", { class: "what" }, middle(item.name),
          el("span", { class: "about" }, `rank ${whole(entry.rank)} of ${whole(told.of)}`), el("span", { class: "span" }, ""),
          el("span", { class: method.signed ? (entry.score < 0 ? "score con" : "score pro") : "score" }, number(entry.score, 3, method.signed)),
          scale.bar(entry, method.signed))));
    }));
    shown += some.length;
    next.hidden = shown >= entries.length;
    next.textContent = `Show more (${whole(entries.length - shown)} left${told.all > entries.length ? ` of the first ${whole(entries.length)}` : ""})`;
  }
  await grow(FIRST);
  card.append(list, next);
  if (method.missing) card.append(el("p", { class: "note" }, `Listed where its rank is known. ${sentence(method.missing)}`));
  card.append(about(method));
  return card;
}
