// The last minute as lanes, one a speaker, on a canvas as high as the list of speakers beside it.

import { clock, colour } from "./session.js";

const SPAN_S = 60;
const TOP = 8; // the list's padding
const ROW = 40;

export class Lanes {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.colours = new Map();
    this.drawn = ""; // what the picture shows: as long as that is the same it is left alone
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.colours.clear();
      this.drawn = "";
    });
  }

  draw(session) {
    const { canvas, context: g } = this;
    const ratio = devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = canvas;
    const now = Math.max(session.clock(), 10);
    const wanted = [session.id, session.seq, now, width, height, ratio].join();
    if (wanted === this.drawn) return;
    this.drawn = wanted;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    const from = Math.max(0, now - SPAN_S);
    const x = (seconds) => ((seconds - from) / (now - from)) * (width - 16) + 4;

    g.font = "11px ui-sans-serif, system-ui, sans-serif";
    g.fillStyle = this.#colour("--quiet");
    g.strokeStyle = this.#colour("--line");
    g.lineWidth = 1;
    const step = now - from > 30 ? 10 : 5;
    for (let at = Math.ceil(from / step) * step; at <= now; at += step) {
      const px = Math.round(x(at)) + 0.5;
      if (px < 8) continue; // beside the border
      g.beginPath();
      g.moveTo(px, 0);
      g.lineTo(px, height - 20);
      g.stroke();
      const text = clock(at);
      if (px > 14 && px < width - 18) g.fillText(text, px - g.measureText(text).width / 2, height - 6);
    }
    for (const gap of session.gaps) {
      if (gap.end < from) continue;
      g.fillStyle = this.#colour("--warn");
      g.globalAlpha = 0.18;
      g.fillRect(x(Math.max(gap.start, from)), 0, Math.max(x(gap.end) - x(Math.max(gap.start, from)), 2), height - 20);
      g.globalAlpha = 1;
    }
    const turns = [...session.turns.values()].filter((turn) => turn.end >= from || !turn.final);
    session.labels.forEach((label, row) => {
      const y = TOP + row * ROW + ROW / 2;
      g.fillStyle = this.#colour("--line");
      g.fillRect(4, y - 0.5, width - 16, 1);
      const ink = this.#colour(`--${colour(label) === "s0" ? "s8" : colour(label)}`);
      for (const turn of turns) {
        if (turn.label !== label) continue;
        g.fillStyle = ink;
        const left = x(Math.max(turn.start, from));
        const right = x(turn.final ? turn.end : Math.max(turn.end, Math.min(now, turn.end + 0.6)));
        g.globalAlpha = turn.final ? 1 : 0.72;
        g.beginPath();
        g.roundRect(left, y - 9, Math.max(right - left, 3), 18, 5);
        g.fill();
        g.globalAlpha = 1;
        // Who talks over whom: both are pale there.
        for (const other of turns) {
          if (other.label === label) continue;
          const begin = Math.max(turn.start, other.start, from);
          const end = Math.min(turn.end, other.end);
          if (end - begin < 0.1) continue;
          g.fillStyle = this.#colour("--paper");
          g.globalAlpha = 0.35;
          g.fillRect(x(begin), y - 9, Math.max(x(end) - x(begin), 2), 18);
          g.globalAlpha = 1;
        }
      }
    });
    if (session.open) {
      g.fillStyle = this.#colour("--bad");
      g.fillRect(x(now), 0, 1.5, height - 20);
    }
  }

  #colour(name) {
    if (!this.colours.has(name)) {
      this.colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
    }
    return this.colours.get(name);
  }
}
