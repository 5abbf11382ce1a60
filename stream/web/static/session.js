// One session as its events tell it: speakers, turns, words. Pure state, no page. A page may stay
// open for days: of turns, words and gaps the latest are kept, of the rest how long each one spoke.

const TURNS = 400;
const WORDS = 4000;
const GAPS = 100;

export class Session {
  constructor(id, stream) {
    this.id = id;
    this.stream = stream;
    this.source = "";
    this.opened = null;
    this.open = true;
    this.now = 0; // seconds of audio, by the latest event
    this.seen = 0; // performance.now() of that event, to let the clock run on between events
    this.seq = -1;
    this.names = new Map(); // label → person
    this.turns = new Map(); // turn_id → {label, start, end, final}
    this.spoken = new Map(); // label → seconds of turns that are no longer kept
    this.words = []; // finals, in order: {text, start, end, label, turn, sure}
    this.before = 0; // words that are no longer kept
    this.partial = []; // words that may still change
    this.gaps = []; // {start, end, reason}
    this.labels = []; // in the order they were heard
    this.past = 0; // how often something said before has changed: a name, a speaker
    this.revised = new Set(); // turn_ids whose speaker changed since the page last looked
    this.late = false; // its beginning was not there any more when the page came
  }

  // → whether it was news
  take(event) {
    if (event.seq <= this.seq) return false; // at least once: seen already
    if (this.seq < 0) this.late = event.seq > 0;
    this.seq = event.seq;
    if (event.end > this.now) {
      this.now = event.end;
      this.seen = performance.now();
    }
    const handle = this[event.type];
    if (handle) handle.call(this, event);
    return true;
  }

  name(label) {
    return this.names.get(label) ?? label ?? "…";
  }

  // Seconds on the session's clock, running on between events while it is open.
  clock() {
    if (!this.open || !this.seen) return this.now;
    return this.now + Math.min((performance.now() - this.seen) / 1000, 1.5);
  }

  talking(label) {
    for (const turn of this.turns.values()) {
      if (turn.label === label && !turn.final) return true;
    }
    return false;
  }

  // Label → seconds spoken.
  shares() {
    const sums = new Map(this.spoken);
    for (const turn of this.turns.values()) {
      sums.set(turn.label, (sums.get(turn.label) ?? 0) + turn.end - turn.start);
    }
    return sums;
  }

  ["session.opened"](event) {
    this.source = event.source;
    this.opened = event.wall_time;
  }

  ["session.closed"]() {
    this.end();
  }

  end() {
    this.open = false;
    this.partial = [];
    for (const turn of this.turns.values()) turn.final = true;
  }

  ["turn.started"](event) {
    this.#turn(event, false);
  }

  ["turn.updated"](event) {
    this.#turn(event, false);
  }

  ["turn.ended"](event) {
    this.#turn(event, true);
  }

  ["speaker.identified"](event) {
    this.#call(event.speaker, event.identity);
  }

  ["speaker.revised"](event) {
    this.past++;
    if (event.reason === "identified") {
      for (const id of event.revision_of) this.revised.add(id);
      return;
    }
    const concerned = new Set(event.revision_of);
    const merged = event.reason === "merged";
    for (const [id, turn] of this.turns) {
      if (turn.label === event.from_label && (merged || concerned.has(id))) {
        turn.label = event.to_label;
        this.revised.add(id);
      }
    }
    for (const word of this.words) {
      if (word.label === event.from_label && (merged || concerned.has(word.turn))) {
        word.label = event.to_label;
        this.revised.add(word.turn);
      }
    }
    if (merged) {
      this.labels = this.labels.filter((label) => label !== event.from_label);
      const moved = this.spoken.get(event.from_label) ?? 0;
      this.spoken.delete(event.from_label);
      if (moved) this.spoken.set(event.to_label, (this.spoken.get(event.to_label) ?? 0) + moved);
    }
    this.#meet(event.to_label);
  }

  ["transcript.partial"](event) {
    this.partial = event.words.map((word) => this.#word(word, event.turn_id));
  }

  ["transcript.final"](event) {
    this.partial = [];
    for (const word of event.words) this.words.push(this.#word(word, event.turn_id));
    if (this.words.length > 1.25 * WORDS) {
      this.before += this.words.length - WORDS;
      this.words.splice(0, this.words.length - WORDS);
    }
  }

  gap(event) {
    this.gaps.push({ start: event.start, end: event.end, reason: event.reason });
    if (this.gaps.length > GAPS) this.gaps.shift();
  }

  #call(label, identity) {
    if ((this.names.get(label) ?? null) === identity) return;
    if (identity === null) this.names.delete(label);
    else this.names.set(label, identity);
    this.past++;
  }

  #word(word, turn) {
    return {
      text: word.word,
      start: word.start,
      end: word.end,
      label: word.speaker,
      turn: turn ?? "",
      sure: word.confidence,
    };
  }

  #turn(event, final) {
    const { label, identity } = event.speaker;
    const before = this.turns.get(event.turn_id);
    if (before && before.label !== label) {
      this.revised.add(event.turn_id);
      this.past++;
    }
    this.turns.set(event.turn_id, { label, start: event.start, end: event.end, final });
    if (identity) this.#call(label, identity);
    this.#meet(label);
    if (!final) return;
    for (const [id, turn] of this.turns) {
      if (this.turns.size <= TURNS) break;
      this.spoken.set(turn.label, (this.spoken.get(turn.label) ?? 0) + turn.end - turn.start);
      this.turns.delete(id);
    }
    // Provisional labels that no turn bears any more were never anyone.
    const borne = new Set([...this.turns.values()].map((turn) => turn.label));
    this.labels = this.labels.filter((each) => borne.has(each) || this.spoken.has(each));
  }

  #meet(label) {
    if (!this.labels.includes(label)) this.labels.push(label);
  }
}

// "S3" → its colour's class.
export function colour(label) {
  const number = Number(/^S(\d+)$/.exec(label ?? "")?.[1] ?? 0);
  return number ? `s${((number - 1) % 8) + 1}` : "s0";
}

// Seconds → "1:05" or "1:02:05".
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}
