// This browser's microphone → /v1/audio. A connection that breaks is taken up again where the
// server left off: what it has not heard is kept for half a minute and sent once more.

const KEEP_S = 30;

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
    this.token = null;
    this.taken = 0; // samples captured so far
    this.kept = []; // {from, samples} not yet known to be heard
    this.node.port.onmessage = (message) => this.#captured(message.data);
    this.#connect();
  }

  async stop() {
    if (!this.running) return;
    this.running = false;
    this.node.port.onmessage = null;
    for (const track of this.stream.getTracks()) track.stop();
    await this.context.close();
    if (this.socket?.readyState === WebSocket.OPEN) {
      this.socket.send(JSON.stringify({ type: "close" }));
    }
    this.onState("off");
  }

  #connect() {
    const url = new URL("/v1/audio", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const query = url.searchParams;
    query.set("encoding", "s16le");
    query.set("rate", this.context.sampleRate);
    query.set("name", "browser");
    query.set("partials", "false");
    if (this.token) {
      query.set("resume", this.token);
      query.set("have", this.kept[0]?.from ?? this.taken);
    }
    this.ready = false;
    this.socket = new WebSocket(url);
    this.socket.onmessage = (message) => {
      const value = JSON.parse(message.data);
      if (value.type !== "ready") return;
      this.token = value.resume_token;
      this.session = value.session_id;
      if (!this.running) {
        // Stopped while it was connecting.
        this.socket.send(JSON.stringify({ type: "close" }));
        return;
      }
      this.ready = true;
      for (const { from, samples } of this.kept) {
        const skip = Math.max(value.received - from, 0);
        if (skip < samples.length) this.socket.send(samples.subarray(skip));
      }
      this.onState("on", value.session_id);
    };
    this.socket.onclose = (close) => {
      this.ready = false;
      if (!this.running) return;
      const slow = close.reason.startsWith("reads too slowly");
      if (REFUSED.has(close.code) && !slow) {
        // Refused: no slot, or the session is over. What was captured belongs to it.
        this.token = null;
        this.stop();
        this.onState("refused", close.reason || "the server has no room for another stream");
        return;
      }
      this.onState("lost");
      setTimeout(() => this.running && this.#connect(), 700);
    };
  }

  #captured(samples) {
    const from = this.taken;
    this.taken += samples.length;
    this.kept.push({ from, samples });
    const oldest = this.taken - KEEP_S * this.context.sampleRate;
    while (this.kept.length && this.kept[0].from < oldest) this.kept.shift();
    if (this.ready) this.socket.send(samples);
  }
}
