// The live feed over a WebSocket: it comes back by itself and misses nothing that is still kept.

export class Feed {
  constructor(onEvent, onState) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.cursor = "0";
    this.wait = 500;
    this.connect();
  }

  connect() {
    const url = new URL("/v1/events", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.searchParams.set("cursor", this.cursor);
    const socket = new WebSocket(url);
    socket.onopen = () => {
      this.wait = 500;
      this.onState("open");
    };
    socket.onmessage = (message) => {
      const value = JSON.parse(message.data);
      if (value.event) {
        this.cursor = value.cursor;
        this.onEvent(value.event);
      }
    };
    socket.onclose = (close) => {
      const denied = close.code === 1008 && /token/.test(close.reason);
      this.onState(denied ? "denied" : "closed");
      if (denied) return;
      setTimeout(() => this.connect(), this.wait * (0.5 + Math.random() / 2));
      this.wait = Math.min(this.wait * 2, 10_000);
    };
  }
}
