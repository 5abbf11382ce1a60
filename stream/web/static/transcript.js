// What is said, as paragraphs: a speaker's words in a row. Nodes are kept and changed in place, so
// that a revision is seen where it happens. As long as nothing changes in what was said before, only
// the last paragraph is looked at.

import { clock, colour } from "./session.js";

const SHOWN = 120; // paragraphs; an earlier one is in the export
const LONGEST = 80; // words of one of them
const PAUSE_S = 2.5;
const UNSURE = 0.3;

export class Transcript {
  constructor(root, latest, onName) {
    this.root = root;
    this.latest = latest;
    this.onName = onName;
    this.earlier = document.createElement("p");
    this.earlier.className = "earlier";
    root.addEventListener("scroll", () => {
      const atEnd = root.scrollHeight - root.scrollTop - root.clientHeight < 60;
      // On its way down, smoothly, it is not at the end yet, and nobody has left it.
      this.following = atEnd || (this.following && root.scrollTop >= this.top);
      this.top = root.scrollTop;
      this.latest.hidden = this.following;
    });
    new ResizeObserver(() => {
      if (this.following) root.scrollTop = root.scrollHeight;
    }).observe(root);
    latest.addEventListener("click", () => this.#follow());
    this.clear();
  }

  clear() {
    this.nodes = new Map(); // number of the first word → node, in the order of the page
    this.past = null; // of the session, when it was drawn last
    this.from = 0; // number of the word that begins the last paragraph of finals
    this.cut = false;
    this.root.replaceChildren();
    this.following = true;
    this.top = 0; // where it was scrolled to last
    this.latest.hidden = true;
  }

  draw(session) {
    const all = session.past !== this.past || this.from < session.before;
    const from = all ? session.before : this.from;
    const paragraphs = gather(session, from);
    if (paragraphs.length > SHOWN) this.cut = true;
    const shown = paragraphs.slice(-SHOWN);
    const keys = new Set(shown.map((each) => each.key));
    for (const [key, node] of this.nodes) {
      if ((all || key >= from) && !keys.has(key)) this.#remove(key, node);
    }
    let next = null;
    for (const paragraph of [...shown].reverse()) {
      let node = this.nodes.get(paragraph.key);
      if (!node) {
        node = build(this.onName);
        this.nodes.set(paragraph.key, node);
      }
      if (node.parentNode !== this.root || node.nextSibling !== next) this.root.insertBefore(node, next);
      fill(node, paragraph, session);
      next = node;
    }
    for (let node; this.root.querySelectorAll(".said").length > SHOWN; this.cut = true) {
      node = this.root.querySelector(".said");
      this.#remove(Number(node.dataset.key), node);
    }
    this.past = session.past;
    this.from = paragraphs.findLast((each) => !each.partial)?.key ?? from;
    this.#sayWhatIsEarlier(session);
    session.revised.clear();
    if (this.following) this.root.scrollTop = this.root.scrollHeight;
  }

  #remove(key, node) {
    node.remove();
    this.nodes.delete(key);
  }

  #sayWhatIsEarlier(session) {
    const text = session.late
      ? "What was said before is no longer kept here."
      : this.cut || session.before > 0 ? "What was said before is in the export." : "";
    if (this.earlier.textContent !== text) this.earlier.textContent = text;
    if (text && this.root.firstChild !== this.earlier) this.root.prepend(this.earlier);
  }

  #follow() {
    this.following = true;
    this.latest.hidden = true;
    this.root.scrollTop = this.root.scrollHeight;
  }
}

// The words from number `from` on → paragraphs. Words that may still change are counted as if they
// were final, so that a paragraph stays the same one when they are.
function gather(session, from) {
  const paragraphs = [];
  const add = (word, number, partial) => {
    const last = paragraphs.at(-1);
    const goesOn = last && last.label === word.label && last.words.length < LONGEST;
    if (goesOn && word.start - last.end < PAUSE_S) {
      last.words.push({ ...word, partial });
      last.end = word.end;
      last.turns.add(word.turn);
    } else {
      paragraphs.push({
        key: number,
        partial,
        label: word.label,
        start: word.start,
        end: word.end,
        words: [{ ...word, partial }],
        turns: new Set([word.turn]),
      });
    }
  };
  const { words, before, partial } = session;
  for (let number = from; number < before + words.length; number++) {
    add(words[number - before], number, false);
  }
  partial.forEach((word, index) => add(word, before + words.length + index, true));
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
  node.dataset.key = paragraph.key;
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
      text.append(span, " ");
    }
    const look = `word${word.partial ? " partial" : word.sure < UNSURE ? " unsure" : ""}`;
    if (span.className !== look) span.className = look;
    if (span.textContent !== word.text) span.textContent = word.text;
  });
  while (text.children.length > paragraph.words.length) {
    text.lastChild.remove(); // the space behind it
    text.lastChild.remove();
  }
}
