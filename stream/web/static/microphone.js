// This browser's microphone → /v1/audio. A connection that breaks is taken up again where the
// server left off: what it has not heard is kept for half a minute and sent once more. Stopped
// while it is broken, it comes back all the same: to say the rest and to end its session.

const KEEP_S = 30;
const AGAIN_MS = 700;
const FAREWELLS = 80; // tries of one that was stopped: about as long as the session waits for it

// Close codes after which trying again changes nothing.
const REFUSED = new Set([1003, 1007, 1008, 1013]);

export class Microphone {
  constructor(onState) {
    this.onState = onState;
    this.running = false;
  }

  async start() {
    if (!navigator.mediaDevices) {
      throw new Error("a browser gives its microphone to https, or to localhost, only");
    }
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false },
    });
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule("/static/capture.js");
    const source = this.context.createMediaStreamSource(this.stream);
    this.node = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0 });
    source.connect(this.node);
    this.running = true;
    const call = new Call(this.context.sampleRate, (state, detail) => {
      if (state === "refused" && this.running) this.stop();
      if (this.running || state === "refused") this.onState(state, detail);
    });
    this.call = call;
    this.node.port.onmessage = (message) => call.say(message.data);
  }

  async stop() {
    if (!this.running) return;
    this.running = false;
    this.node.port.onmessage = null;
    for (const track of this.stream.getTracks()) track.stop();
    this.call.end();
    this.onState("off");
    await this.context.close();
  }
}

// One stream of audio over as many connections as it takes.
class Call {
  constructor(rate, onState) {
    this.rate = rate;
    this.onState = onState;
    this.token = null;
    this.taken = 0; // samples captured so far
    this.kept = []; // {from, samples} not yet known to be heard
    this.ready = false;
    this.alone = false; // the session ends with its connection
    this.over = false; // nothing more is said
    this.farewells = FAREWELLS;
    this.#connect();
  }

  say(samples) {
    const from = this.taken;
    this.taken += samples.length;
    this.kept.push({ from, samples });
    const oldest = this.taken - KEEP_S * this.rate;
    while (this.kept.length && this.kept[0].from < oldest) this.kept.shift();
    if (this.ready) this.socket.send(samples);
  }

  end() {
    this.over = true;
    if (this.ready) this.#close();
  }

  #close() {
    this.socket.send(JSON.stringify({ type: "close" }));
  }

  #connect() {
    const url = new URL("/v1/audio", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const query = url.searchParams;
    query.set("encoding", "s16le");
    query.set("rate", this.rate);
    query.set("name", "browser");
    query.set("partials", "false");
    if (this.token) {
      query.set("resume", this.token);
      query.set("have", this.kept[0]?.from ?? this.taken);
    }
    const socket = new WebSocket(url);
    this.socket = socket;
    socket.onmessage = (message) => {
      const value = JSON.parse(message.data);
      if (value.type !== "ready") return;
      this.token = value.resume_token;
      this.alone = value.resume_token === null;
      for (const { from, samples } of this.kept) {
        const skip = Math.max(value.received - from, 0);
        if (skip < samples.length) socket.send(samples.subarray(skip));
      }
      this.ready = true;
      if (this.over) this.#close();
      else this.onState("on", value.session_id);
    };
    socket.onclose = (close) => {
      this.ready = false;
      const slow = close.reason.startsWith("reads too slowly");
      if (this.alone || (REFUSED.has(close.code) && !slow)) {
        // No slot, or the session is over. What was captured belongs to it.
        if (!this.over) this.onState("refused", close.reason || (this.alone ? "the connection broke" : "the server has no room for another stream"));
        return;
      }
      if (this.over && (close.code === 1000 || !this.token || this.farewells-- <= 0)) return;
      if (!this.over) this.onState("lost");
      setTimeout(() => this.#connect(), AGAIN_MS);
    };
  }
}
