// What a screen reader says of a session: its finals. Of many at once (a page that has just come is
// told all that is kept) it says the latest.

const EVERY_MS = 1000;
const AT_ONCE = 5;
const KEPT = 20;

export class Aloud {
  constructor(root) {
    this.root = root;
    this.clear();
    setInterval(() => this.#say(), EVERY_MS);
  }

  clear() {
    this.waiting = [];
    this.root.replaceChildren();
  }

  take(text) {
    this.waiting.push(text);
    if (this.waiting.length > AT_ONCE) this.waiting.shift();
  }

  #say() {
    for (const text of this.waiting.splice(0)) {
      const line = document.createElement("p");
      line.textContent = text;
      this.root.append(line);
    }
    while (this.root.childElementCount > KEPT) this.root.firstChild.remove();
  }
}
