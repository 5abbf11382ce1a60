// What is said, as paragraphs: a speaker's words in a row. Nodes are kept and changed in place, so
// that a revision is seen where it happens.

import { clock, colour } from "./session.js";

const SHOWN = 150; // paragraphs; an earlier one is in the export
const PAUSE_S = 2.5;
const UNSURE = 0.3;

export class Transcript {
  constructor(root, latest, onName) {
    this.root = root;
    this.latest = latest;
    this.onName = onName;
    this.following = true;
    this.nodes = new Map(); // first word's time → node
    root.addEventListener("scroll", () => {
      this.following = root.scrollHeight - root.scrollTop - root.clientHeight < 60;
      this.latest.hidden = this.following;
    });
    latest.addEventListener("click", () => this.#follow());
  }

  clear() {
    this.nodes.clear();
    this.root.replaceChildren();
    this.following = true;
    this.latest.hidden = true;
  }

  draw(session) {
    const paragraphs = gather(session).slice(-SHOWN);
    const keys = new Set(paragraphs.map((each) => each.key));
    for (const [key, node] of this.nodes) {
      if (!keys.has(key)) {
        node.remove();
        this.nodes.delete(key);
      }
    }
    let before = null;
    for (const paragraph of paragraphs) {
      let node = this.nodes.get(paragraph.key);
      if (!node) {
        node = build(this.onName);
        this.nodes.set(paragraph.key, node);
      }
      const place = before ? before.nextSibling : this.root.firstChild;
      if (place !== node) this.root.insertBefore(node, place);
      fill(node, paragraph, session);
      before = node;
    }
    session.revised.clear();
    if (this.following) this.root.scrollTop = this.root.scrollHeight;
  }

  #follow() {
    this.following = true;
    this.latest.hidden = true;
    this.root.scrollTop = this.root.scrollHeight;
  }
}

function gather(session) {
  const paragraphs = [];
  const add = (word, partial) => {
    const last = paragraphs.at(-1);
    if (last && last.label === word.label && word.start - last.end < PAUSE_S) {
      last.words.push({ ...word, partial });
      last.end = word.end;
      last.turns.add(word.turn);
    } else {
      paragraphs.push({
        key: `w${word.start.toFixed(2)}`,
        label: word.label,
        start: word.start,
        end: word.end,
        words: [{ ...word, partial }],
        turns: new Set([word.turn]),
      });
    }
  };
  for (const word of session.words) add(word, false);
  for (const word of session.partial) add(word, true);
  return paragraphs;
}

function build(onName) {
  const node = document.createElement("article");
  node.className = "said";
  const left = document.createElement("div");
  const who = document.createElement("button");
  who.type = "button";
  who.className = "who";
  who.title = "Say who this is";
  who.addEventListener("click", () => onName(node.dataset.label));
  const at = document.createElement("span");
  at.className = "at";
  left.append(who, at);
  const text = document.createElement("p");
  text.className = "text";
  node.append(left, text);
  return node;
}

function fill(node, paragraph, session) {
  const { label } = paragraph;
  const changed = node.dataset.label !== undefined && node.dataset.label !== (label ?? "");
  const revised = [...paragraph.turns].some((turn) => turn && session.revised.has(turn));
  node.dataset.label = label ?? "";
  node.classList.remove("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8");
  node.classList.add(colour(label));
  if (changed || revised) {
    node.classList.remove("revised");
    void node.offsetWidth; // begin the animation anew
    node.classList.add("revised");
  }
  const who = node.querySelector(".who");
  const name = label ? session.name(label) : "…";
  if (who.textContent !== name) who.textContent = name;
  const at = node.querySelector(".at");
  const time = clock(paragraph.start);
  if (at.textContent !== time) at.textContent = time;
  const text = node.querySelector(".text");
  paragraph.words.forEach((word, index) => {
    let span = text.children[index];
    if (!span) {
      span = document.createElement("span");
      text.append(span);
    }
    const look = `word${word.partial ? " partial" : word.sure < UNSURE ? " unsure" : ""}`;
    if (span.className !== look) span.className = look;
    if (span.textContent !== `${word.text} `) span.textContent = `${word.text} `;
  });
  while (text.children.length > paragraph.words.length) text.lastChild.remove();
}
