// Scores as bars from zero, with whiskers of one standard error, on one scale per list.

import { number, svg, whole } from "./dom.js";

export class Scale {
  constructor(entries) {
    const low = entries.map((entry) => entry.score - (entry.stderr || 0));
    const high = entries.map((entry) => entry.score + (entry.stderr || 0));
    this.low = Math.min(0, ...low);
    this.high = Math.max(0, ...high);
    if (this.low === this.high) this.high = 1;
  }

  at(value) {
    return 1 + 98 * ((value - this.low) / (this.high - this.low));
  }

  bar({ score, stderr }, signed) {
    const zero = this.at(0);
    const end = this.at(score);
    const parts = [
      svg("line", { class: "zero", x1: `${zero}%`, x2: `${zero}%`, y1: "0", y2: "100%" }),
      svg("rect", { class: signed ? (score < 0 ? "con" : "pro") : "size", x: `${Math.min(zero, end)}%`, width: `${Math.abs(end - zero)}%`, y: "30%", height: "40%", rx: "1.5" }),
    ];
    if (stderr) {
      const from = `${this.at(score - stderr)}%`;
      const to = `${this.at(score + stderr)}%`;
      parts.push(svg("line", { class: "whisker", x1: from, x2: to, y1: "50%", y2: "50%" }),
        svg("line", { class: "whisker", x1: from, x2: from, y1: "28%", y2: "72%" }), svg("line", { class: "whisker", x1: to, x2: to, y1: "28%", y2: "72%" }));
    }
    return svg("svg", { class: "bar-of", "aria-hidden": "true", focusable: "false" }, parts);
  }
}

export function scoreText({ score, stderr }, signed) {
  return `${number(score, 3, signed)}${stderr ? ` ± ${number(stderr, 2)}` : ""}`;
}

export const between = ([first, last]) => (first === last ? `${first}` : `${whole(first)}–${whole(last)}`);
