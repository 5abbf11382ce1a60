// The page: feed → sessions → what is shown of the chosen one.

import { Aloud } from "./aloud.js";
import { Feed } from "./feed.js";
import { Lanes } from "./lanes.js";
import { Microphone } from "./microphone.js";
import { Session, clock, colour } from "./session.js";
import { Transcript } from "./transcript.js";

const CLOSED = 20; // sessions that are over and still listed

const $ = (id) => document.getElementById(id);
const main = document.querySelector("main");
const sessions = new Map();
let chosen = null;
let pinned = false; // the user chose; a newer session does not take the page away
let stale = true;
let status; // of the house; null where it is not known, undefined before it was asked
let connection = "wait";
let lag = null;

const lanes = new Lanes($("canvas"));
const transcript = new Transcript($("words"), $("latest"), ask);
const aloud = new Aloud($("aloud"));
const microphone = new Microphone(heard);

function take(event) {
  let session = sessions.get(event.session_id);
  if (!session) {
    session = new Session(event.session_id, event.stream_id);
    sessions.set(session.id, session);
    if (!pinned) choose(session.id);
  }
  const news = session.take(event);
  if (session !== chosen) session.revised.clear(); // nobody looks
  else if (news && event.type === "transcript.final") aloud.take(sentence(session, event.words));
  if (!session.open) prune();
  if (event.lag_ms !== undefined && /^(turn|transcript)\./.test(event.type)) {
    lag = lag === null ? event.lag_ms : 0.9 * lag + 0.1 * event.lag_ms;
  }
  stale = true;
}

function sentence(session, words) {
  const text = words.map((each) => each.word).join(" ");
  const label = words[0]?.speaker;
  return label ? `${session.name(label)}: ${text}` : text;
}

// The oldest of those that are over go; what is kept of them is kept by the daemon.
function prune() {
  const over = [...sessions.values()].filter((session) => !session.open);
  for (const session of over.slice(0, Math.max(0, over.length - CLOSED))) {
    if (session !== chosen) sessions.delete(session.id);
  }
}

// Sessions that a daemon which ended otherwise than by closing them does not know any more.
async function forget() {
  const before = [...sessions.values()].filter((session) => session.open);
  if (!before.length) return;
  try {
    const answer = await fetch("/v1/sessions");
    if (!answer.ok) return;
    const listed = (await answer.json()).sessions.filter((entry) => entry.state === "open");
    const open = new Set(listed.map((entry) => entry.session));
    for (const session of before) if (!open.has(session.id)) session.end();
    prune();
    stale = true;
  } catch {
    // It is gone again: the next connection asks again.
  }
}

function choose(id) {
  chosen = sessions.get(id) ?? null;
  transcript.clear();
  aloud.clear();
  main.hidden = !chosen;
  for (const form of ["rttm", "vtt", "json", "txt"]) {
    $(`export-${form}`).href = chosen ? `/v1/sessions/${encodeURIComponent(chosen.id)}/export.${form}` : "";
  }
  stale = true;
}

function draw() {
  requestAnimationFrame(draw);
  if (stale) {
    stale = false;
    list();
    badge();
    if (chosen) {
      $("title").textContent = chosen.stream;
      const people = chosen.labels.length;
      const opened = chosen.opened ? new Date(chosen.opened).toLocaleTimeString([], { timeStyle: "short" }) : "";
      $("about").textContent = [
        chosen.source,
        opened && `since ${opened}`,
        `${people} ${people === 1 ? "speaker" : "speakers"}`,
        chosen.open ? "live" : "ended",
      ].filter(Boolean).map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
      showPeople(chosen);
      transcript.draw(chosen);
    }
  }
  if (chosen && !document.hidden) lanes.draw(chosen);
}

function list() {
  const all = [...sessions.values()].sort((a, b) => Number(b.open) - Number(a.open) || b.opened?.localeCompare(a.opened ?? ""));
  $("nobody").hidden = all.length > 0;
  reconcile($("sessions"), all, (session) => session.id, () => {
    const button = document.createElement("button");
    button.type = "button";
    for (const part of ["dot", "name", "time"]) {
      const span = document.createElement("span");
      span.className = part;
      button.append(span);
    }
    button.addEventListener("click", () => {
      pinned = true;
      choose(button.dataset.id);
    });
    return button;
  }, (button, session) => {
    button.dataset.id = session.id;
    button.dataset.state = session.open ? "open" : "closed";
    button.setAttribute("aria-current", String(session === chosen));
    put(button.children[1], session.stream);
    put(button.children[2], clock(session.now));
  });
}

function showPeople(session) {
  const shares = session.shares();
  const total = [...shares.values()].reduce((sum, each) => sum + each, 0);
  reconcile($("speakers"), session.labels, (label) => label, () => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Say who this is";
    for (const part of ["chip", "name", "share"]) {
      const span = document.createElement("span");
      span.className = part;
      button.append(span);
    }
    button.addEventListener("click", () => ask(button.dataset.label));
    return button;
  }, (button, label) => {
    button.dataset.label = label;
    button.className = `${colour(label)}${session.open && session.talking(label) ? " talking" : ""}`;
    put(button.children[1], session.name(label));
    put(button.children[2], total ? `${Math.round((100 * (shares.get(label) ?? 0)) / total)} %` : "");
    button.setAttribute("aria-label", `${session.name(label)}: say who this is`);
  });
  $("canvas").setAttribute("aria-label", `Lanes of ${session.labels.map((label) => session.name(label)).join(", ") || "nobody yet"}`);
}

// A list's items by key: what is there stays where it is.
function reconcile(root, items, key, build, fill) {
  const nodes = new Map([...root.children].map((node) => [node.dataset.key, node]));
  let before = null;
  for (const item of items) {
    let node = nodes.get(key(item));
    if (!node) {
      node = document.createElement("li");
      node.dataset.key = key(item);
      node.append(build());
    }
    nodes.delete(key(item));
    const place = before ? before.nextSibling : root.firstChild;
    if (place !== node) root.insertBefore(node, place);
    fill(node.firstChild, item);
    before = node;
  }
  for (const node of nodes.values()) node.remove();
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// The text changes all the time: it is read out when the state does.
function badge() {
  const [state, text] = health();
  put($("health"), text);
  if ($("health").dataset.state === state) return;
  $("health").dataset.state = state;
  put($("health-aloud"), text);
}

function health() {
  if (connection === "closed") return ["bad", "not connected, trying again …"];
  if (connection !== "open" || status === undefined) return ["wait", "connecting …"];
  if (status === null) return ["unknown", "the server's state is not known"];
  if (status.busy_s > 2) return ["bad", "the engine is stuck"];
  const open = status.streams;
  const parts = [open === 1 ? "1 stream" : `${open} streams`];
  if (lag !== null && open) parts.push(`${(lag / 1000).toFixed(1)} s behind`);
  if (status.realtime_factor && open) {
    parts.push(`${Math.round(status.realtime_factor * open * 100)} % busy`);
  }
  return [lag > 3000 ? "slow" : "good", parts.join(" · ")];
}

async function look() {
  try {
    const answer = await fetch("/v1/status");
    if (answer.status === 401) login();
    status = answer.ok ? await answer.json() : null;
  } catch {
    status = null;
  }
  stale = true;
}

// Ask the server to do something → why it did not, or "".
async function send(method, path, body) {
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(path, { method, headers, body: JSON.stringify(body) });
    return answer.ok ? "" : await reason(answer);
  } catch {
    return "the server cannot be reached";
  }
}

// Endpoints say `error`, the gate before them `err_msg`, a proxy before both anything.
async function reason(answer) {
  const plain = answer.statusText || `the server answered ${answer.status}`;
  try {
    const { error, err_msg } = await answer.json();
    return error ?? err_msg ?? plain;
  } catch {
    return plain;
  }
}

function login() {
  if ($("login").open) return;
  $("login").showModal();
}

$("login").querySelector("form").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  const error = await send("POST", "/v1/login", { token: $("login-token").value });
  $("login-error").textContent = error;
  if (error) return;
  $("login").close();
  feed.connect();
  look();
});

async function ask(label) {
  if (!chosen || !label || !chosen.labels.includes(label)) return;
  if (!chosen.open) return toast("This session has ended: names can be given while it is open.");
  $("naming-label").textContent = chosen.name(label);
  $("naming-name").value = chosen.names.get(label) ?? "";
  $("naming-enrol").checked = false;
  $("naming-consent").value = $("naming-days").value = "";
  keeping();
  $("naming-error").textContent = "";
  $("naming").dataset.label = label;
  $("naming").dataset.session = chosen.id;
  $("naming").showModal();
  try {
    const { voices } = await (await fetch("/v1/voices")).json();
    $("known").replaceChildren(...voices.map((name) => {
      const option = document.createElement("option");
      option.value = name;
      return option;
    }));
  } catch {
    // Names can be typed.
  }
}

// What is kept with a voice is asked only of those who keep one.
function keeping() {
  const on = $("naming-enrol").checked;
  $("naming-voice").hidden = !on;
  $("naming-enrol").setAttribute("aria-expanded", String(on));
  // A hidden field that is wrong would hold the form back, unseen.
  $("naming-consent").disabled = $("naming-days").disabled = !on;
}

$("naming-enrol").addEventListener("change", keeping);
$("naming-cancel").addEventListener("click", () => $("naming").close());
$("naming").querySelector("form").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  const { label, session } = $("naming").dataset;
  const enrol = $("naming-enrol").checked;
  const consent = $("naming-consent").value.trim() || null;
  const days = Number($("naming-days").value) || null;
  const path = `/v1/sessions/${encodeURIComponent(session)}/speakers/${label}`;
  const name = $("naming-name").value;
  const error = await send("PUT", path, { name, enrol, ...(enrol && { consent, days }) });
  $("naming-error").textContent = error;
  if (!error) $("naming").close();
});

function heard(state, detail) {
  const on = state !== "off" && state !== "refused";
  $("mic").setAttribute("aria-pressed", String(on));
  put($("mic").querySelector("span"), on ? "Stop" : "Microphone");
  if (state === "on") {
    pinned = false;
    if (sessions.has(detail)) choose(detail);
  }
  if (state === "lost") toast("The connection broke; what you say is kept.");
  if (state === "slow") toast("The connection is too slow: some of what was said is left out.");
  if (state === "refused") toast(detail);
}

$("mic").addEventListener("click", async () => {
  if (microphone.state === "on") return microphone.stop();
  try {
    await microphone.start();
  } catch (error) {
    toast(error.name === "NotAllowedError" ? "The browser was not allowed to use the microphone." : `No microphone: ${error.message}`);
  }
});

document.addEventListener("keydown", (key) => {
  if (key.ctrlKey || key.metaKey || key.altKey || document.querySelector("dialog[open]")) return;
  if (key.key === "m") $("mic").click();
  if (key.key === "j" || key.key === "k") {
    const ids = [...$("sessions").children].map((node) => node.dataset.key);
    const next = ids[ids.indexOf(chosen?.id) + (key.key === "j" ? 1 : -1)];
    if (next) {
      pinned = true;
      choose(next);
    }
  }
});

let fading;
function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(fading);
  fading = setTimeout(() => $("toast").classList.remove("shown"), 5000);
}

const feed = new Feed(take, (state) => {
  connection = state;
  stale = true;
  if (state === "denied") login();
  if (state === "open") {
    look();
    forget();
  }
});
setInterval(look, 5000);
requestAnimationFrame(draw);
