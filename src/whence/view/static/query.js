// One picture: what every method says of it, side by side.

import { $, choice, el, get, many, middle, number, picture, short, whole } from "./dom.js";
import { Scale, between, scoreText } from "./bars.js";
import { pick, pickButton } from "./picked.js";

export async function query({ run, rest, params, set, signal }) {
  const row = Number(rest[0]);
  const k = Number(params.get("k")) || 12;
  const found = await get(`api/${run.number}/query/${row}?k=${k}`, signal);
  try { sessionStorage.setItem(`query:${run.root}`, row); } catch { /* only a habit */ }
  const step = (by) => { const to = row + by; if (to >= 0 && to < run.queries.count) location.hash = `#/${run.number}/picture/${to}`; };
  const agreement = el("section", { class: "card", "aria-labelledby": "agree" });
  get(`api/${run.number}/agreement/${row}`, signal).then((pairs) => agreement.replaceChildren(...agree(run, pairs)), () => agreement.remove());
  const columns = el("div", { class: "methods" }, found.methods.map((told, number) => column(run, found, told, run.methods[number])));
  const glance = glances(run, found, columns);
  // The next one is asked for meanwhile, so that turning the pages does not wait.
  const ahead = setTimeout(() => row + 1 < run.queries.count && get(`api/${run.number}/query/${row + 1}?k=${k}`, signal).catch(() => {}), 400);
  return {
    title: found.query.name,
    nodes: [
      el("div", { class: "split" },
        subject(run, "queries", found.query, step, [
          el("a", { class: "button", href: `#/${run.number}/compare/${row}` }, "Compare methods"),
          choice("Images", [12, 24, 50, 100].map((count) => [count, `first ${count}`]), k, (value) => { location.hash = `#/${run.number}/picture/${row}?k=${value}`; }),
        ]),
        el("div", { class: "flow" }, columns,
          el("div", { class: "cards" }, found.methods.length > 1 && agreement, ...sums(run, found)))),
    ],
    step,
    close: () => { clearTimeout(ahead); glance.close(); },
  };
}

// A picture with everything that is known of it, and the way to its neighbours.
export function subject(run, side, about, step, more) {
  const count = run[side].count;
  const name = side === "queries" ? "picture" : "training image";
  const facets = new Map(run.train.facets.map((facet, number) => [facet.column, number]));
  return el("aside", { class: "subject", "aria-label": `The ${name}` },
    el("div", { class: "portrait" }, picture(run, side, about.row, { size: "picture", lazy: false, alt: `${name} ${about.name}${about.caption ? `: ${about.caption}` : ""}` })),
    el("h1", { class: "file" }, about.name),
    about.caption && el("p", { class: "caption" }, about.caption),
    about.warning && el("p", { class: "warning", role: "note" }, `It ${about.warning}`),
    el("dl", { class: "facts" }, about.columns.filter((one) => one.value !== about.caption).map((one) => {
      const at = facets.get(one.column);
      const linked = side === "train" && at !== undefined && one.code !== null;
      return [el("dt", {}, one.column), el("dd", {}, linked ? el("a", { href: `#/${run.number}/group/${at}/${one.code}` }, one.value) : one.value)];
    })),
    el("div", { class: "steps" },
      el("button", { type: "button", onclick: () => step(-1), disabled: about.row === 0, "aria-label": `the ${name} before`, "aria-keyshortcuts": "ArrowLeft" }, "←"),
      el("span", {}, `${whole(about.row + 1)} of ${whole(count)}`),
      el("button", { type: "button", onclick: () => step(1), disabled: about.row === count - 1, "aria-label": `the ${name} after`, "aria-keyshortcuts": "ArrowRight" }, "→"),
      side === "train" && pickButton(run, about.row, about.name)),
    el("div", { class: "more" }, more));
}

function column(run, found, told, method) {
  const id = `m-${method.name.replace(/\W/g, "-")}`;
  const scale = new Scale([...told.top, ...told.low]);
  const low = told.low.length ? (told.low.some((entry) => entry.score < 0) ? "Strongest opponents" : "Lowest scores") : "";
  const title = method.signed ? (told.top.some((entry) => entry.score > 0) ? "Strongest proponents" : "Highest scores") : "Strongest by magnitude";
  return el("section", { class: "card method", "aria-labelledby": id },
    el("header", {}, el("h2", { id, title: `${method.sign}. ${method.scale}` }, method.name), told.reliability !== null && gauge(told),
      el("p", { class: "sure" }, [method.question && `Asked: ${method.question}.`, told.sure && sentence(told.sure), told.leaning && lean(told.leaning), method.scored && `Scored: ${method.scored}.`].filter(Boolean).join(" "))),
    list(run, found, told, method, title, told.top, scale),
    low && list(run, found, told, method, low, [...told.low], scale),
    ...[told.note, method.missing].filter(Boolean).map((text) => el("p", { class: "note" }, sentence(text))), about(method));
}

// What holds for all scores of a method.
export function about(method) {
  const lines = [["Asked", method.question], ["Sign", method.sign], ["Unit", method.scale], ["Errors", method.errors], ["Scored", method.scored]];
  return el("details", { class: "aboutit" }, el("summary", {}, "About these scores"),
    el("dl", { class: "facts" }, lines.filter(([, text]) => text).map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])));
}

export const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

function lean({ out, p, rate }) {
  return out ? `It leans on single images more than held-out pictures do (p = ${number(p, 2)}, rate ${number(rate, 2)}).` : `No single image stands out beside held-out pictures (p = ${number(p, 2)}).`;
}

function gauge(told) {
  const poor = told.reliability < told.low_reliability;
  const text = poor ? "these scores depend mostly on what was drawn for them" : "the correlation to be expected between two such runs";
  return el("span", { class: poor ? "gauge poor" : "gauge", title: `Reliability: ${text}` }, poor ? "low reliability " : "reliability ", el("b", {}, number(told.reliability, 2)));
}

function list(run, found, told, method, title, entries, scale) {
  const units = entries[0]?.between ? "may rank · score" : "score";
  return [el("div", { class: "over" }, el("h3", {}, title), el("span", { class: "units", "aria-hidden": "true" }, units)), el("ol", { class: "entries" }, entries.map((entry) => {
    const image = found.images[entry.row];
    const score = scoreText(entry, method.signed);
    const span = entry.between ? `may rank ${between(entry.between)}` : "";
    const others = elsewhere(found, entry.row, method.name).map(([name, rank]) => `${name} rank ${rank}`).join(", ");
    return el("li", { "data-row": entry.row, class: image.same ? "same" : null },
      el("a", { class: "entry", href: `#/${run.number}/image/${entry.row}`, "aria-label": `rank ${entry.rank}, ${image.name}${image.label ? `, ${image.label}` : ""}, score ${score}${span ? `, ${span}` : ""}${image.same ? ", the picture itself" : ""}${others ? `; elsewhere: ${others}` : ""}` },
        el("span", { class: "rank" }, whole(entry.rank)),
        el("span", { class: "shot" }, picture(run, "train", entry.row)),
        el("span", { class: "what" }, middle(image.name),
          el("span", { class: "about" }, image.same ? "the picture itself" : image.label || image.caption),
          el("span", { class: "span", title: span }, entry.between ? between(entry.between) : ""),
          el("span", { class: method.signed ? (entry.score < 0 ? "score con" : "score pro") : "score" }, number(entry.score, 3, method.signed)),
          scale.bar(entry, method.signed))),
      pickButton(run, entry.row, image.name));
  }))];
}

const elsewhere = (found, row, but) => found.methods.filter((told) => told.name !== but).map((told) => [told.name, told.ranks[row] === undefined ? "–" : whole(told.ranks[row])]);

// The image that is pointed at is lit in every list, and its rank in each method is told at the foot of the window.
function glances(run, found, holder) {
  const box = $("glance");
  let lit = null;
  function light(row) {
    if (row === lit) return;
    for (const one of holder.querySelectorAll(".lit")) one.classList.remove("lit");
    lit = row;
    box.hidden = row === null;
    if (row === null) return;
    for (const one of holder.querySelectorAll(`[data-row="${row}"]`)) one.classList.add("lit");
    const image = found.images[row];
    box.replaceChildren(el("span", { class: "shot" }, picture(run, "train", row)), el("span", { class: "called" }, short(image.name, 40)),
      ...found.methods.map((told) => el("span", { class: "in" }, `${told.name} `, el("b", {}, told.ranks[row] === undefined ? "–" : whole(told.ranks[row])))));
  }
  const over = (event) => light(event.target.closest?.("[data-row]") ? Number(event.target.closest("[data-row]").dataset.row) : null);
  holder.addEventListener("pointerover", over);
  holder.addEventListener("focusin", over);
  holder.addEventListener("pointerleave", () => light(null));
  holder.addEventListener("focusout", (event) => { if (!holder.contains(event.relatedTarget)) light(null); });
  return { close: () => { box.hidden = true; } };
}

// How alike each two methods see this picture.
function agree(run, pairs) {
  const names = run.methods.map((method) => method.name);
  const of = (a, b) => pairs.find(({ pair }) => pair.includes(a) && pair.includes(b));
  const cell = (a, b) => {
    if (a === b) return el("td", { class: "self", "aria-label": "the same method" }, "·");
    const one = of(a, b);
    const told = one.spearman !== null ? number(one.spearman, 2) : one.why ? "not known" : "undefined";
    const level = one.spearman === null ? 0 : Math.min(4, Math.round(Math.abs(one.spearman) * 4));
    return el("td", { class: `level${level} ${one.spearman < 0 ? "against" : ""}`, title: `Spearman ${told} over ${many(one.images, "image")}${one.why && `: ${one.why}`}${one.magnitude ? ", by magnitude" : ""}${one.shared === null ? "" : `; ${one.shared} of the first ${one.first} shared (${number(one.chance, 2)} by chance)`}` },
      el("b", {}, told), one.shared !== null && el("small", {}, `${one.shared} of ${one.first}`));
  };
  return [el("h2", { id: "agree" }, "Agreement of the methods"),
    el("div", { class: "tablewrap", tabindex: "0", role: "region", "aria-labelledby": "agree" }, el("table", { class: "agree" },
      el("thead", {}, el("tr", {}, el("td", {}), names.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, names.map((a) => el("tr", {}, el("th", { scope: "row" }, a), names.map((b) => cell(a, b))))))),
    el("p", { class: "note" }, `Rank correlation over all images that both scored; below it, how many of their first ${pairs[0]?.first ?? 10} they share (${number(pairs[0]?.chance ?? 0, 2)} by chance).${pairs.some((one) => one.why) ? ` Not known: ${pairs.find((one) => one.why).why}.` : ""}`)];
}

// Sums by creator, class ... of the methods whose scores add up.
function sums(run, found) {
  return run.train.facets.flatMap((facet, at) => {
    const parts = found.methods.map((told, number) => ({ told, method: run.methods[number], sums: told.sums.find((one) => one.column === facet.column) })).filter((one) => one.sums);
    if (!parts.length) return [];
    const names = new Map(facet.values.map((value) => [value.code, value.name]));
    const id = `sum-${at}`;
    return [el("section", { class: "card", "aria-labelledby": id }, el("h2", { id }, `Sums by ${facet.column}`),
      el("div", { class: "sums" }, parts.map(({ told, method, sums: { groups, of } }) => {
        const scale = new Scale(groups.map((group) => ({ score: group.sum })));
        return el("div", {}, el("h3", {}, method.name), el("ol", { class: "entries plain" }, groups.map((group) => el("li", {},
          el("a", { class: "entry", href: `#/${run.number}/group/${at}/${group.code}`, "aria-label": `${names.get(group.code) ?? group.code}, sum ${number(group.sum, 3, method.signed)}` },
            el("span", { class: "what" }, el("span", { class: "about strong" }, short(names.get(group.code) ?? `value ${group.code}`, 40)), el("span", {}),
              el("span", { class: method.signed ? (group.sum < 0 ? "score con" : "score pro") : "score" }, number(group.sum, 3, method.signed)),
              scale.bar({ score: group.sum }, method.signed)))))),
          groups.length < of && el("p", { class: "note" }, `${groups.length} of ${whole(of)} values`));
      })),
      el("p", { class: "note" }, "A sum, not a Shapley value: it ignores how images work together. Groups of more images have larger sums. Only methods that scored every image."))];
  });
}
