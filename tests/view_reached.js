() => {
  const seen = [...document.querySelectorAll("a[href], button, select, input, textarea, canvas, [tabindex='0']")].filter((node) => node.checkVisibility() && !node.disabled && !node.closest("dialog:not([open])"));
  // On a wall one tile has the focus and the arrow keys move it, as in every grid.
  const missed = seen.filter((node) => node.tabIndex < 0 && !node.closest(".grid"));
  const nameless = seen.filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.[0]?.textContent.trim() || node.getAttribute("aria-labelledby")));
  const pictures = [...document.querySelectorAll("img:not([alt])")];
  return [...missed, ...nameless, ...pictures].map((node) => node.outerHTML.slice(0, 120));
}
