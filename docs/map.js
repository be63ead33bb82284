"use strict";
(() => {
  const world = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const svg = $("map"), frame = $("frame"), card = $("card"), SVG = "http://www.w3.org/2000/svg";
  const nodes = new Map(world.nodes.map((node) => [node.name, { ...node, home: [node.x, node.y], shown: true }]));
  for (const g of document.querySelectorAll(".node")) nodes.get(g.dataset.name).g = g;
  const lines = [...document.querySelectorAll("#lineage path")];
  let zoom = 1, pinned = null, size = world.size;

  const make = (parent, tag, attributes, words) => {
    const one = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
    if (words !== undefined) one.textContent = words; // never as HTML
    parent.append(one);
    return one;
  };
  const curve = (a, b) => {
    if (Math.abs(a.x - b.x) < 1) {
      const bow = a.x - 22 - Math.abs(a.y - b.y) / 12;
      return `M${a.x - 9} ${a.y} Q${bow} ${(a.y + b.y) / 2} ${b.x - 10} ${b.y}`;
    }
    const middle = (b.x - 10 - a.x) / 2;
    return `M${a.x} ${a.y + 8} C${a.x + middle} ${a.y + 14} ${b.x - middle / 2 - 10} ${b.y} ${b.x - 10} ${b.y}`;
  };

  const draw = () => {
    for (const node of nodes.values()) {
      node.g.setAttribute("transform", `translate(${node.x},${node.y})`);
      node.g.classList.toggle("gone", !node.shown);
      node.g.setAttribute("tabindex", node.shown && !node.dim ? "0" : "-1");
    }
    for (const line of lines) {
      const [a, b] = [nodes.get(line.dataset.from), nodes.get(line.dataset.to)];
      line.setAttribute("d", curve(a, b));
      line.style.display = $("arrows").checked && a.shown && b.shown ? "" : "none";
    }
    share();
  };
  const share = () => { // methods with the same part, in a chain from left to right: all pairs would be a knot
    const part = $("part").value, groups = new Map();
    $("shared").replaceChildren();
    for (const node of nodes.values()) {
      const value = part && node.shown ? node.parts[part] : undefined;
      if (value !== undefined) groups.set(value, [...(groups.get(value) || []), node]);
    }
    for (const [value, members] of groups) {
      members.sort((a, b) => a.x - b.x || a.y - b.y);
      for (let i = 1; i < members.length; i++)
        make(make($("shared"), "path", { d: curve(members[i - 1], members[i]) }), "title", {}, `${part}: ${value}`);
    }
    if (part) $("said").textContent = [...groups].map(([value, members]) => `${value}: ${members.length}`).join(", ");
  };

  const axis = (title, x1, y1, x2, y2) => {
    make($("axes"), "line", { x1, y1, x2, y2 });
    return title;
  };
  const place = () => {
    const view = $("view").value, years = view === "years";
    $("ground").style.display = years ? "" : "none";
    $("axes").replaceChildren();
    for (const node of nodes.values()) {
      [node.x, node.y] = node.home;
      node.shown = true;
      node.g.querySelector(".whisker").removeAttribute("d");
      node.g.querySelector("text").setAttribute("y", 4);
    }
    size = world.size;
    svg.classList.toggle("scatter", !years);
    if (!years) scatter(...view.split(" "));
    svg.setAttribute("aria-label", years ? "Methods by year and family" : "LDS against seconds");
    fit();
    draw();
  };
  const scatter = (board, kind) => {
    size = [1240, 900];
    const [left, first, right, top, bottom] = [64, 200, 1060, 24, 840];
    const known = [...nodes.values()].filter((node) => node.lds[board] && node.lds[board][kind]);
    for (const node of nodes.values()) node.shown = known.includes(node);
    const seconds = known.map((node) => node.lds[board].seconds).filter((s) => s !== null);
    const low = Math.floor(Math.log10(Math.min(...seconds))), high = Math.ceil(Math.log10(Math.max(...seconds)));
    const X = (s) => s === null ? left + 16 : first + ((Math.log10(s) - low) / (high - low)) * (right - first);
    const least = Math.min(0, Math.floor(10 * Math.min(...known.map((node) => node.lds[board][kind][1]))) / 10);
    const Y = (v) => bottom - ((v - least) / (1 - least)) * (bottom - top);
    for (let power = low; power <= high; power++) {
      axis("", X(10 ** power), top, X(10 ** power), bottom);
      make($("axes"), "text", { x: X(10 ** power) - 8, y: bottom + 18 }, `${+(10 ** power).toPrecision(1)} s`);
    }
    for (let v = 0; v <= 1.001; v += 0.2) {
      axis("", left, Y(v), right, Y(v));
      make($("axes"), "text", { x: left - 32, y: Y(v) + 4 }, v.toFixed(1));
    }
    make($("axes"), "text", { x: left, y: bottom + 18 }, "time not known");
    const limit = world.ceilings[board][kind].estimate;
    make($("axes"), "line", { class: "limit", x1: left, x2: right, y1: Y(limit), y2: Y(limit) });
    make($("axes"), "text", { x: right + 8, y: Y(limit) + 4 }, `ceiling ${limit.toFixed(2)}`);
    make($("axes"), "text", { x: left, y: bottom + 38 }, `seconds for all queries of the bank (log), without the trainings that a method reads; LDS on ${board}, ${kind === "heldout" ? "held-out" : "generated"}, with 95 % intervals`);
    const taken = [], ordered = known.sort((a, b) => b.lds[board][kind][0] - a.lds[board][kind][0]);
    for (const node of ordered) [node.x, node.y] = [X(node.lds[board].seconds), Y(node.lds[board][kind][0])];
    for (const node of ordered) {
      const [, from, to] = node.lds[board][kind];
      const width = 20 + 7 * node.name.length, free = (off) =>
        !taken.some(([x, y, w]) => Math.abs(y - node.y - off) < 15 && node.x < x + w && x < node.x + width) &&
        !ordered.some((one) => one !== node && Math.abs(one.y - node.y - off) < 14 && one.x > node.x + 2 && one.x - 9 < node.x + width);
      // The shape stays at its figure; the label goes to the nearest free place, at the end of a line.
      let off = 0;
      for (let i = 1; !free(off); i++) off = 4 * Math.ceil(i / 2) * (i % 2 ? 1 : -1);
      taken.push([node.x, node.y + off, width]);
      node.g.querySelector("text").setAttribute("y", 4 + off);
      const leader = Math.abs(off) > 6 ? `M0 0L12 ${off}` : "";
      node.g.querySelector(".whisker").setAttribute("d", `M0 ${Y(to) - node.y}V${Y(from) - node.y}${leader}`);
    }
  };
  const resize = () => {
    svg.setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
    svg.setAttribute("width", size[0] * zoom);
    svg.setAttribute("height", size[1] * zoom);
    fade();
  };
  // What is cut off at the right fades out, so that one sees that there is more.
  const fade = () => frame.classList.toggle("more", frame.scrollLeft + frame.clientWidth < frame.scrollWidth - 2);
  frame.addEventListener("scroll", fade);
  const fit = () => {
    zoom = Math.min(1.25, Math.max(0.72, frame.clientWidth / size[0])); // smaller could not be read: then it scrolls
    resize();
  };
  const zoomed = (by, x, y) => {
    const [left, top] = [(frame.scrollLeft + x) / zoom, (frame.scrollTop + y) / zoom];
    zoom = Math.min(4, Math.max(0.3, zoom * by));
    resize();
    frame.scrollTo(left * zoom - x, top * zoom - y);
  };

  const show = (node, pin) => {
    if (pinned && !pin) return;
    for (const one of nodes.values()) one.g.classList.remove("on", "near");
    for (const line of lines) line.classList.remove("on");
    pinned = pin ? node : null;
    card.hidden = !node;
    card.replaceChildren();
    if (!node) return;
    node.g.classList.add("on");
    const from = [], to = [];
    for (const line of lines) {
      if (line.dataset.from !== node.name && line.dataset.to !== node.name) continue;
      line.classList.add("on");
      const other = line.dataset.from === node.name ? line.dataset.to : line.dataset.from;
      nodes.get(other).g.classList.add("near");
      (line.dataset.to === node.name ? from : to).push(other);
    }
    const add = (parent, tag, words) => {
      const one = document.createElement(tag);
      if (words !== undefined) one.textContent = words;
      parent.append(one);
      return one;
    };
    const [box, own] = [frame.getBoundingClientRect(), node.g.getBoundingClientRect()];
    const side = own.left - box.left > box.width / 2 ? " left" : ""; // never over the node itself
    card.className = `f${world.families.indexOf(node.family)}${pin ? "" : " through"}${side}`;
    add(card, "h3", node.name);
    add(card, "code", node.formula);
    const list = add(card, "dl");
    const fact = (name, words) => { if (words) { add(list, "dt", name); add(list, "dd", words); } };
    fact("family", node.family);
    fact("source", `${node.source}${node.year ? ` ${node.year}` : ""}`);
    fact("computes", node.cost);
    fact("needs", node.needs);
    fact("settings", node.settings);
    fact("builds on", from.join(", "));
    fact("led to", to.join(", "));
    fact("parts", Object.entries(node.parts).map(([name, value]) => `${name} ${value}`).join("; "));
    for (const [board, found] of Object.entries(node.lds)) {
      const told = ["heldout", "generated"].filter((kind) => found[kind]).map((kind) => {
        const [value, low, high] = found[kind].map((x) => x.toFixed(3));
        return `${kind === "heldout" ? "held-out" : kind} ${value} [${low}, ${high}]`;
      });
      fact(`LDS, ${board}`, `${told.join("; ")}${found.seconds === null ? "" : `; ${found.seconds.toFixed(1)} s`}`);
    }
    if (!Object.keys(node.lds).length) fact("LDS", "on none of the boards");
    add(card, "code", node.command);
    if (pin) {
      const close = add(card, "button", "\u00d7");
      close.setAttribute("aria-label", "close the card");
      close.addEventListener("click", () => { show(null, true); node.g.focus(); });
    }
  };

  const find = () => {
    const words = $("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const node of nodes.values()) {
      const all = [node.name, node.family, node.source, node.year, node.cost, node.needs, node.settings, ...Object.entries(node.parts).flat()].join(" ").toLowerCase();
      node.dim = !words.every((word) => all.includes(word));
      node.g.classList.toggle("dim", node.dim);
      count += !node.dim && node.shown;
    }
    $("said").textContent = words.length ? `${count} found` : "";
    draw();
  };
  const step = (node, dx, dy) => { // the nearest in that direction, what lies beside it counting three times
    let best = null, least = Infinity;
    for (const one of nodes.values()) {
      const [x, y] = [one.x - node.x, one.y - node.y], along = x * dx + y * dy, beside = Math.abs(x * dy) + Math.abs(y * dx);
      if (one === node || !one.shown || one.dim || along < 1) continue;
      if (along + 3 * beside < least) [best, least] = [one, along + 3 * beside];
    }
    return best;
  };

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  let moved = false;
  for (const node of nodes.values()) {
    const g = node.g;
    g.addEventListener("pointerenter", () => show(node, false));
    g.addEventListener("pointerleave", () => show(null, false));
    g.addEventListener("focus", () => show(node, false));
    g.addEventListener("blur", () => show(null, false));
    g.addEventListener("click", () => { if (!moved) show(pinned === node ? null : node, true); });
    g.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { show(pinned === node ? null : node, true); event.preventDefault(); }
      const way = ARROWS[event.key], next = way && step(node, ...way);
      if (way) event.preventDefault();
      if (next) { next.g.focus(); next.g.scrollIntoView({ block: "nearest", inline: "nearest" }); }
    });
    g.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch") return; // a finger scrolls
      const start = [event.clientX, event.clientY, node.x, node.y];
      moved = false;
      const move = (now) => {
        const [dx, dy] = [(now.clientX - start[0]) / zoom, (now.clientY - start[1]) / zoom];
        if (Math.hypot(dx, dy) < 4 && !moved) return;
        moved = true;
        [node.x, node.y] = [start[2] + dx, start[3] + dy];
        draw();
      };
      addEventListener("pointermove", move);
      addEventListener("pointerup", () => removeEventListener("pointermove", move), { once: true });
      event.stopPropagation();
    });
  }
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.pointerType === "touch") return;
    const start = [event.clientX + frame.scrollLeft, event.clientY + frame.scrollTop];
    const move = (now) => frame.scrollTo(start[0] - now.clientX, start[1] - now.clientY);
    frame.classList.add("held");
    addEventListener("pointermove", move);
    addEventListener("pointerup", () => { removeEventListener("pointermove", move); frame.classList.remove("held"); }, { once: true });
  });
  frame.addEventListener("wheel", (event) => {
    const box = frame.getBoundingClientRect();
    event.preventDefault();
    zoomed(event.deltaY < 0 ? 1.12 : 1 / 1.12, event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  addEventListener("keydown", (event) => { if (event.key === "Escape") show(null, true); });
  for (const button of document.querySelectorAll("#zoom button"))
    button.addEventListener("click", () => +button.dataset.by ? zoomed(+button.dataset.by, frame.clientWidth / 2, frame.clientHeight / 2) : fit());
  $("search").addEventListener("input", find);
  $("view").addEventListener("change", place);
  $("part").addEventListener("change", () => { $("said").textContent = ""; draw(); });
  $("arrows").addEventListener("change", draw);
  addEventListener("resize", fit);
  place();

  const selftest = () => { // `map.html#selftest`: what a person does, one after the other; the answer is in the page
    const check = (name, fact) => { if (!fact) throw new Error(name); };
    const press = (g, key) => g.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    const set = (id, value, kind) => { $(id).value = value; $(id).dispatchEvent(new Event(kind)); };
    const trak = nodes.get("trak"), shown = () => [...nodes.values()].filter((node) => !node.g.classList.contains("gone"));
    trak.g.dispatchEvent(new Event("pointerenter"));
    check("hover shows the card", !card.hidden && card.textContent.includes("--method trak"));
    trak.g.dispatchEvent(new Event("pointerleave"));
    check("leaving hides it", card.hidden);
    press(trak.g, "Enter");
    nodes.get("abu").g.dispatchEvent(new Event("pointerenter"));
    check("a pinned card stays", card.textContent.includes("--method trak"));
    press(document.body, "Escape");
    check("Escape lets go", card.hidden);
    trak.g.focus();
    press(trak.g, "ArrowDown");
    check("arrows move", document.activeElement !== trak.g && document.activeElement.classList.contains("node"));
    set("search", "barshan", "input");
    check("search dims", nodes.get("trak").g.classList.contains("dim") && !nodes.get("relatif_loss").g.classList.contains("dim"));
    check("what is dim is passed over", trak.g.getAttribute("tabindex") === "-1");
    set("search", "", "input");
    set("part", "preconditioner", "change");
    check("shared parts are joined", $("shared").children.length > 3);
    set("part", "", "change");
    check("and parted", $("shared").children.length === 0);
    set("view", "digits heldout", "change");
    check("LDS against seconds", shown().length > 30 && shown().length < nodes.size && nodes.get("ek_fac").y < nodes.get("pixel_cosine").y);
    set("view", "years", "change");
    check("all come back", shown().length === nodes.size);
    set("view", "photos generated", "change");
    check("no label of the other view lies on another", overlaps() === 0);
    set("view", "years", "change");
    const before = zoom;
    document.querySelector('#zoom [data-by="1.25"]').click();
    check("zoom", zoom > before);
    fit();
    check("no label lies on another", overlaps() === 0);
  };
  const overlaps = () => {
    const boxes = [...nodes.values()].filter((node) => node.shown).map((node) => node.g.querySelector("text").getBoundingClientRect());
    let count = 0;
    for (let i = 0; i < boxes.length; i++)
      for (let j = 0; j < i; j++) {
        const [a, b] = [boxes[i], boxes[j]];
        count += a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
      }
    return count;
  };
  if (location.hash === "#selftest") {
    try { selftest(); document.body.dataset.selftest = "passed"; } catch (error) { document.body.dataset.selftest = `failed: ${error.message}`; }
  } else if (location.hash.startsWith("#view=")) { // a link to a view
    const view = decodeURIComponent(location.hash.slice(6));
    if ([...$("view").options].some((option) => option.value === view)) { $("view").value = view; place(); }
  }
})();
