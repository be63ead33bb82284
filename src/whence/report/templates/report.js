"use strict";
/* The one script of the page: tables that are sorted by a click, and pictures that open large. Without it nothing is missing. */
(() => {
  const make = (tag, attributes, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  /* Tables. A cell is sorted by data-value, else by its text; numbers before words. */
  const value = (row, column) => {
    const cell = row.cells[column], told = cell.dataset.value ?? cell.textContent.trim();
    return told !== "" && Number.isFinite(Number(told)) ? Number(told) : told;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b
    : typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : a.localeCompare(b));
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const rows = [...body.rows];
        const largest = head.getAttribute("aria-sort") !== "descending" && column > 0 ||
          column === 0 && head.getAttribute("aria-sort") === "ascending";
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", largest ? "descending" : "ascending");
        rows.sort((a, b) => (largest ? -1 : 1) * compare(value(a, column), value(b, column)));
        body.append(...rows);
      });
    });
  }

  /* Pictures. A training image opens beside its query. */
  const large = make("figure", {}), beside = make("figure", {}), told = make("p", { "aria-live": "polite" });
  const close = make("button", { type: "button", class: "close" }, "Close");
  const dialog = make("dialog", { class: "lightbox", "aria-label": "the picture, large" },
    make("div", { class: "pair" }, beside, large), told, close);
  document.body.append(dialog);
  let strip = [], place = 0;
  const copy = (image, caption) => {
    const one = make("img", { src: image.src, alt: image.alt });
    if (image.classList.contains("pixels")) one.classList.add("pixels");
    return [one, make("figcaption", {}, caption)];
  };
  const show = (number) => {
    place = (number + strip.length) % strip.length;
    const image = strip[place], query = image.closest(".query")?.querySelector(".portrait img");
    const tile = image.closest(".tile");
    large.replaceChildren(...copy(image, tile ? "training image" : "query"));
    beside.replaceChildren(...(query && query !== image ? copy(query, "query") : []));
    beside.hidden = !beside.firstChild;
    const lines = tile ? [...tile.querySelectorAll("p")].map((line) => line.title || line.textContent.trim()) : [image.alt];
    const rest = strip.length > 1 ? ` (${place + 1} of ${strip.length}; arrow keys)` : "";
    told.textContent = lines.join(" · ") + rest;
  };
  for (const image of document.querySelectorAll(".tile img, .portrait img")) {
    image.tabIndex = 0;
    image.setAttribute("role", "button");
    const open = () => {
      const list = image.closest(".strip");
      strip = list ? [...list.querySelectorAll("img")] : [image];
      show(strip.indexOf(image));
      dialog.showModal();
    };
    image.addEventListener("click", open);
    image.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); }
    });
  }
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { event.preventDefault(); show(place + step); }
  });

  /* A page to quote. */
  for (const block of document.querySelectorAll(".cite pre")) {
    if (!navigator.clipboard) break;
    const button = make("button", { type: "button" }, "Copy");
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.textContent);
      button.textContent = "Copied";
    });
    block.after(button);
  }

  /* What is folded away is printed, too. */
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.folded:not([open])")];
    opened.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((each) => { each.open = false; }));
})();
