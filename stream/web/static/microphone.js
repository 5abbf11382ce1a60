// This browser's microphone → /v1/audio. A connection that breaks is taken up again where the
// server left off: what it has not heard is kept for half a minute and sent once more. Stopped
// while it is broken, it comes back all the same: to say the rest and to end its session. A
// connection that is too slow is left, with all that waits in it, for one that begins with now.

const KEEP_S = 30;
const WAITS_S = 5; // audio that may wait for a slow connection, beside what it had to catch up with
const AGAIN_MS = 700;
const FAREWELLS = 80; // tries of one that was stopped: about as long as the session waits for it

// Close codes after which trying again changes nothing, and the one of a server that has no room.
const REFUSED = new Set([1003, 1007, 1008]);
const LATER = 1013;

export class Microphone {
  constructor(onState) {
    this.onState = onState;
    this.state = "off"; // off, starting, on
  }

  async start() {
    if (this.state !== "off") return;
    this.state = "starting";
    try {
      await this.#open();
    } catch (error) {
      this.#release();
      throw error;
    }
  }

  stop() {
    if (this.state !== "on") return;
    this.node.port.onmessage = null;
    this.#release();
    this.call.end();
    this.onState("off");
  }

  // The microphone itself comes last: until it is heard, nothing of it is on.
  async #open() {
    if (!navigator.mediaDevices) {
      throw new Error("a browser gives its microphone to https, or to localhost, only");
    }
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule("/static/capture.js");
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false },
    });
    const source = this.context.createMediaStreamSource(this.stream);
    this.node = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0 });
    source.connect(this.node);
    this.state = "on";
    const call = new Call(this.context.sampleRate, (state, detail) => {
      if (state === "refused") this.stop();
      if (this.state === "on" || state === "refused") this.onState(state, detail);
    });
    this.call = call;
    this.node.port.onmessage = (message) => call.say(message.data);
  }

  #release() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.context?.close();
    this.stream = this.context = null;
    this.state = "off";
  }
}

// One stream of audio over as many connections as it takes.
export class Call {
  constructor(rate, onState) {
    this.rate = rate;
    this.onState = onState;
    this.token = null;
    this.kept = []; // blocks of samples, the latest: the server may not have heard them
    this.first = 0; // position of the first sample kept
    this.taken = 0; // samples captured so far
    this.ready = false;
    this.least = 0; // seconds of audio: the least that ever waited in this connection
    this.alone = false; // the session ends with its connection
    this.over = false; // nothing more is said
    this.farewells = FAREWELLS;
    this.#connect();
  }

  say(samples) {
    this.kept.push(samples);
    this.taken += samples.length;
    // While a connection is made, the server believes that we have what we had when it began.
    this.#forget(this.ready ? KEEP_S : 2 * KEEP_S);
    if (!this.ready) return;
    this.socket.send(samples);
    const waits = this.socket.bufferedAmount / samples.BYTES_PER_ELEMENT / this.rate;
    this.least = Math.min(this.least, waits);
    if (waits - this.least > WAITS_S) this.#leaveOut();
  }

  end() {
    this.over = true;
    if (this.ready) this.#close();
  }

  #close() {
    this.socket.send(JSON.stringify({ type: "close" }));
  }

  #forget(seconds) {
    while (this.taken - this.first > seconds * this.rate) this.first += this.kept.shift().length;
  }

  // What waits is lost, and the server is told so by what the next connection has.
  #leaveOut() {
    if (this.alone) {
      this.onState("refused", "The connection is too slow.");
      return;
    }
    this.kept = [];
    this.first = this.taken;
    this.onState("slow");
    this.#leave();
    this.#connect();
  }

  #leave() {
    this.ready = false;
    this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
  }

  #connect() {
    this.#forget(KEEP_S);
    const url = new URL("/v1/audio", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const query = url.searchParams;
    query.set("encoding", "s16le");
    query.set("rate", this.rate);
    query.set("name", "browser");
    query.set("partials", "false");
    if (this.token) {
      query.set("resume", this.token);
      query.set("have", this.first);
    } else {
      // A session begins with the first sample that it can be given.
      this.taken -= this.first;
      this.first = 0;
    }
    const socket = new WebSocket(url);
    this.socket = socket;
    socket.onmessage = (message) => {
      const value = JSON.parse(message.data);
      if (value.type === "ready") this.#goOn(value);
    };
    socket.onclose = (close) => {
      this.ready = false;
      if (this.alone || REFUSED.has(close.code) || (close.code === LATER && !this.token)) {
        // No slot, or the session is over. What was captured belongs to it.
        if (!this.over) this.onState("refused", close.reason || (this.alone ? "the connection broke" : "the server has no room for another stream"));
        return;
      }
      if (this.over && (close.code === 1000 || !this.token || this.farewells-- <= 0)) return;
      if (!this.over) this.onState("lost");
      setTimeout(() => this.#connect(), AGAIN_MS);
    };
  }

  #goOn({ received, resume_token, session_id }) {
    this.token = resume_token;
    this.alone = resume_token === null;
    if (received < this.first && !this.alone) {
      // It took so long that what the server waits for is not there any more: say so.
      this.#leave();
      this.#connect();
      return;
    }
    let from = this.first;
    for (const samples of this.kept) {
      const skip = Math.max(received - from, 0);
      if (skip < samples.length) this.socket.send(samples.subarray(skip));
      from += samples.length;
    }
    this.ready = true;
    this.least = Infinity;
    if (this.over) this.#close();
    else this.onState("on", session_id);
  }
}
