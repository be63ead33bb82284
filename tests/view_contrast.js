() => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (text) => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = text; pen.fillRect(0, 0, 1, 1); const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4); return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
  const behind = (node) => { const layers = []; for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor)); return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]); };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || node.closest(":disabled, .unseen, script, noscript, .skip, option")) continue;
    const ground = behind(node);
    const a = light(over(parse(getComputedStyle(node).color), ground)), b = light(ground);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${node.className || node.tagName} ${text.slice(0, 30)}`);
  }
  return [...new Set(faint)];
}
