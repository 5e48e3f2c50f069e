"use strict";
// The page: streams one text at a time from /v1/completions or /v1/chat/completions. It contacts no other server, and
// stores nothing but the API key, for this tab.

const $ = (id) => document.getElementById(id);
const RANGES = ["max_tokens", "temperature", "top_k", "top_p", "min_p"];
const OFF = { top_k: 0, top_p: 1, min_p: 0 };
const state = { name: null, running: null, given: "", points: [], tokens: [], spans: [], chosen: -1 };

// ---- requests ---------------------------------------------------------------------------------------------

function headers() {
  const key = sessionStorage.getItem("bitnet-key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

class ServerError extends Error {
  constructor(status, message, retry) {
    super(message);
    this.status = status;
    this.retry = retry;
  }
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not an error object of this server: only the status is known */ }
  throw new ServerError(response.status, message, response.headers.get("Retry-After"));
}

// Lets the browser handle input and redraw: a small model generates faster than a page can show. A timer would not do,
// since a tab in the background gets one tick per second.
function yieldToBrowser() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    await yieldToBrowser();
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}

async function* events(response) {
  let complete = false;
  for await (const line of lines(response)) {
    if (!line.startsWith("data: ")) continue;
    if (line === "data: [DONE]") {
      complete = true;
      continue;
    }
    const event = JSON.parse(line.slice(6));
    if (event.error) throw new ServerError(503, event.error.message, null);
    yield event;
  }
  if (!complete) throw new TypeError("the connection ended early");
}

function explain(error) {
  if (error instanceof ServerError) {
    if (error.status === 401) {
      $("key-form").hidden = false;
      $("key").focus();
      return sessionStorage.getItem("bitnet-key") ? "The server did not accept this key." : "";
    }
    if (error.status === 429) return `The server is busy. Try again in ${error.retry || "a few"} s.`;
    if (error.status === 503) return `The server cannot answer now: ${error.message}.`;
    return error.message;
  }
  showServer("gone", "not reachable");
  watch();
  return "The server does not answer. It may have been stopped; this page keeps trying to reach it.";
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// ---- generating -------------------------------------------------------------------------------------------

function settings() {
  const values = Object.fromEntries(RANGES.map((name) => [name, Number($(name).value)]));
  const seed = $("seed").value.trim();
  if (seed) values.seed = Number(seed);
  const stop = $("stop-at").value.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
  if (stop) values.stop = stop;
  return values;
}

function request(prompt) {
  const common = { model: state.name, stream: true, stream_options: { include_usage: true }, ...settings() };
  if ($("chat").checked) {
    const messages = [{ role: "user", content: prompt }];
    return ["v1/chat/completions", { ...common, messages, logprobs: true, top_logprobs: 5 }];
  }
  return ["v1/completions", { ...common, prompt, logprobs: 5 }];
}

async function write(given) {
  if (state.running || !state.name) return;
  if (!/^\d{0,15}$/.test($("seed").value.trim())) return showError("Seed: enter a whole number of up to 15 digits, or leave it empty.");
  const chat = $("chat").checked;
  clear(chat ? "" : given);
  const [path, body] = request(given);
  const stopper = new AbortController();
  state.running = stopper;
  showRunning(true);
  const clock = { began: performance.now(), first: 0, last: 0, count: 0 };
  let reason = "stopped";
  try {
    const sent = { method: "POST", headers: headers(), body: JSON.stringify(body), signal: stopper.signal };
    for await (const event of events(await checked(await fetch(path, sent)))) {
      const choice = event.choices[0];
      if (!choice) continue;
      take(chat ? fromChat(choice) : fromCompletion(choice), clock);
      reason = choice.finish_reason || reason;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reason = "failed";
      showError(explain(error));
    }
  }
  state.running = null;
  showRunning(false);
  showStats(clock, reason);
}

// Both kinds of stream as text and tokens: {name, start (in code points; null: that of the text), probability, top}.
function fromCompletion(choice) {
  const found = choice.logprobs || { tokens: [] };
  const tokens = found.tokens.map((name, i) => ({
    name,
    start: found.text_offset[i],
    probability: Math.exp(found.token_logprobs[i]),
    top: likeliest(found.top_logprobs[i]),
  }));
  return { text: choice.text, tokens };
}

// Sorted, because an object lists names that are whole numbers first, whatever their order in the reply.
function likeliest(chances) {
  return Object.entries(chances).map(([name, value]) => [name, Math.exp(value)]).sort((a, b) => b[1] - a[1]);
}

function fromChat(choice) {
  const tokens = (choice.logprobs?.content || []).map((entry) => ({
    name: entry.token,
    start: null,
    probability: Math.exp(entry.logprob),
    top: entry.top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]),
  }));
  return { text: choice.delta.content || "", tokens };
}

function take({ text, tokens }, clock) {
  if (tokens.length) {
    clock.last = performance.now();
    clock.first ||= clock.last;
    clock.count += tokens.length;
  }
  const from = state.points.length;
  const follow = atEnd();
  state.points.push(...text);
  const changed = Math.max(0, state.tokens.length - 1);
  for (const token of tokens) {
    token.start ??= from;
    state.tokens.push(token);
    state.spans.push(tokenSpan(token, state.spans.length));
  }
  for (let i = changed; i < state.tokens.length; i++) {
    const end = i + 1 < state.tokens.length ? state.tokens[i + 1].start : state.points.length;
    state.spans[i].textContent = state.points.slice(state.tokens[i].start, end).join("");
  }
  if (tokens.length) showStats(clock, null);
  if (follow) scrollTo({ top: document.documentElement.scrollHeight });
}

function tokenSpan(token, index) {
  const span = document.createElement("span");
  span.className = "token";
  span.tabIndex = index ? -1 : 0;
  span.dataset.index = index;
  span.style.setProperty("--doubt-share", (1 - Math.sqrt(token.probability)).toFixed(3));
  span.setAttribute("aria-describedby", "token-chance");
  $("text").append(span);
  return span;
}

function atEnd() {
  return innerHeight + scrollY >= document.documentElement.scrollHeight - 40 && scrollY > 0;
}

function clear(given) {
  Object.assign(state, { given, points: [], tokens: [], spans: [], chosen: -1 });
  $("text").replaceChildren();
  if (given) {
    const span = document.createElement("span");
    span.className = "given";
    span.textContent = given;
    $("text").append(span);
  }
  $("inspector").hidden = true;
  $("stats").textContent = "";
  showError("");
}

// ---- output -----------------------------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
const visible = (name) => name.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll(" ", "\u2423");

function showRunning(on) {
  const left = [$("write"), $("stop"), $("more"), $("copy")].includes(document.activeElement);
  document.body.classList.toggle("writing", on);
  $("write").hidden = on;
  $("stop").hidden = !on;
  $("more").hidden = $("copy").hidden = on || !state.points.length;
  $("more").hidden ||= $("chat").checked;
  $("empty").hidden = on || Boolean(state.points.length || state.given);
  if (on) $("status").textContent = "Generating";
  if (left) (on ? $("stop") : $("write").disabled ? $("prompt") : $("write")).focus(); // a hidden button loses the focus
}

function showStats(clock, reason) {
  const seconds = (clock.last - clock.first) / 1000;
  const parts = [];
  if (clock.count) parts.push(`${clock.count} token${clock.count === 1 ? "" : "s"}`);
  if (clock.count > 1 && seconds > 0) parts.push(`${Math.round((clock.count - 1) / seconds)} tokens/s`);
  if (clock.count) parts.push(`first token after ${Math.round(clock.first - clock.began)} ms`);
  const why = { stop: "ended by the model", length: "", stopped: "stopped", failed: "interrupted" }[reason] || "";
  if (why) parts.push(why);
  $("stats").textContent = parts.join(" \u00b7 ");
  if (reason !== null) $("status").textContent = reason === "failed" ? "" : `Done. ${parts.join(", ")}`;
}

function inspect(index) {
  const token = state.tokens[index];
  if (!token) return;
  state.spans[state.chosen]?.classList.remove("chosen");
  state.chosen = index;
  state.spans[index].classList.add("chosen");
  $("token-name").textContent = visible(token.name);
  $("token-chance").textContent = `probability ${percent(token.probability)}`;
  const entries = token.top.some(([name]) => name === token.name) ? token.top : [...token.top, [token.name, token.probability]];
  $("alternatives").replaceChildren(...entries.map(([name, share]) => alternative(name, share, name === token.name)));
  $("inspector").hidden = false;
}

function alternative(name, share, taken) {
  const row = document.createElement("li");
  row.classList.toggle("taken", taken);
  const code = document.createElement("code");
  code.textContent = visible(name);
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.append(document.createElement("i"));
  bar.style.setProperty("--share", share.toFixed(4));
  const number = document.createElement("span");
  number.className = "share";
  number.textContent = percent(share);
  row.append(code, bar, number);
  return row;
}

function moveTo(index) {
  while (state.spans[index] && !state.spans[index].textContent) index += index < state.chosen ? -1 : 1;
  if (!state.spans[index]) return;
  if (state.spans[state.chosen]) state.spans[state.chosen].tabIndex = -1;
  state.spans[0].tabIndex = -1;
  state.spans[index].tabIndex = 0;
  state.spans[index].focus();
}

// ---- the panel --------------------------------------------------------------------------------------------

const bytes = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(2)} MB` : `${(n / 1e3).toFixed(1)} kB`);
const count = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} billion` : n >= 1e6 ? `${(n / 1e6).toFixed(2)} million` : n.toLocaleString("en"));

function showFacts(info) {
  const { engine, inside } = info;
  const names = { cpu: "C++", torch: "torch", triton: "Triton" };
  const rows = [];
  if (inside && !inside.error) {
    const config = inside.config;
    rows.push(["Parameters", count(inside.parameters)]);
    if (inside.ternary_parameters) rows.push([config.linear === "binary" ? "Binary" : "Ternary", count(inside.ternary_parameters)]);
    rows.push(["File", `${bytes(inside.file_bytes)}, ${inside.ratio_to_float16.toFixed(1)}\u00d7 smaller than fp16`]);
    rows.push(["Bits per weight", inside.bits_per_weight.toFixed(2)]);
    if (inside.zero_fraction !== null) rows.push(["Zeros", percent(inside.zero_fraction)]);
    rows.push(["Shape", `${config.num_hidden_layers} layers, width ${config.hidden_size}`]);
    rows.push(["Vocabulary", config.vocab_size.toLocaleString("en")]);
  }
  rows.push(["Context", `${info.context.toLocaleString("en")} tokens`]);
  rows.push(["Engine", `${names[engine.name] || engine.name}, ${engine.kernels}`]);
  rows.push(["Device", engine.threads ? `${engine.device}, ${engine.threads} thread${engine.threads === 1 ? "" : "s"}` : engine.device]);
  if (engine.head !== "file" || engine.cache !== "fp32") rows.push(["Rounding", `head ${engine.head}, cache ${engine.cache}`]);
  rows.push(["Sequences", `${info.sequences} at once`]);
  if (!inside) rows.push(["Weights", "inspecting ..."]);
  if (inside?.error) rows.push(["Weights", inside.error]);
  $("facts").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  if (inside?.layers?.length) showZeros(inside.layers);
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function showZeros(layers) {
  const blocks = new Map();
  for (const layer of layers) {
    const parts = layer.name.split(".");
    const kind = parts.at(-1).replace("_proj", "");
    if (!blocks.has(parts[2])) blocks.set(parts[2], new Map());
    blocks.get(parts[2]).set(kind, layer.zero_fraction);
  }
  const kinds = [...blocks.values().next().value.keys()];
  const shares = layers.map((layer) => layer.zero_fraction);
  const [low, high] = [Math.min(...shares), Math.max(...shares)];
  const head = document.createElement("tr");
  head.append(element("th", "", { scope: "col" }), ...kinds.map((kind) => element("th", kind, { scope: "col" })));
  head.firstChild.append(element("span", "layer", { class: "unseen" }));
  const rows = [...blocks].map(([index, block]) => {
    const row = document.createElement("tr");
    row.append(element("th", index, { scope: "row" }));
    for (const kind of kinds) {
      const cell = element("td", (100 * block.get(kind)).toFixed(0), { title: `layer ${index}, ${kind}: ${percent(block.get(kind))}` });
      cell.style.setProperty("--level", high > low ? ((block.get(kind) - low) / (high - low)).toFixed(3) : "0");
      row.append(cell);
    }
    return row;
  });
  const [thead, tbody] = [document.createElement("thead"), document.createElement("tbody")];
  thead.append(head);
  tbody.append(...rows);
  $("zeros-table").replaceChildren(element("caption", "Zeros in percent, by layer and projection", { class: "unseen" }), thead, tbody);
  $("zeros").hidden = false;
}

// ---- the server's state -----------------------------------------------------------------------------------

function showServer(name, text) {
  $("server").dataset.state = name;
  $("server-text").textContent = text;
  $("write").disabled = name !== "ready";
}

let watching = 0;
function watch() {
  clearTimeout(watching);
  watching = setTimeout(connect, 1500);
}

async function connect() {
  clearTimeout(watching);
  try {
    const health = await fetch("health");
    if (!health.ok) {
      showServer("loading", "loading the model");
      return watch();
    }
    const info = await (await checked(await fetch("info", { headers: headers() }))).json();
    const first = state.name === null;
    state.name = info.name;
    document.title = `${info.name} \u00b7 BitNet`;
    $("model-name").textContent = info.name;
    $("chat-row").hidden = !info.chat;
    if (first && info.chat) {
      $("chat").checked = true;
      showLabel();
    }
    $("max_tokens").max = info.context;
    if (first) $("max_tokens").value = Math.min(128, Math.floor(info.context / 2));
    showRanges();
    showFacts(info);
    showServer("ready", "ready");
    $("key-form").hidden = true;
    if ($("error").textContent.startsWith("The server does not answer")) showError("");
    if (!info.inside) watch();
  } catch (error) {
    if (error instanceof ServerError && error.status !== 503) {
      showServer("locked", error.status === 401 ? "needs a key" : "refused");
      return showError(explain(error));
    }
    showServer("gone", "not reachable");
    watch();
  }
}

function showLabel() {
  $("prompt-label").textContent = $("chat").checked ? "Message" : "Prompt";
}

function showRanges() {
  for (const name of RANGES) {
    const value = $(name).value;
    const shown = name in OFF && Number(value) === OFF[name] ? "off" : name === "temperature" && Number(value) === 0 ? "0, greedy" : value;
    document.querySelector(`output[for="${name}"]`).textContent = shown;
    $(name).setAttribute("aria-valuetext", shown);
  }
}

// ---- keyboard, buttons, pointer ---------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write($("prompt").value);
});
$("stop").addEventListener("click", () => state.running?.abort());
$("more").addEventListener("click", () => write(state.given + state.points.join("")));
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(state.given + state.points.join(""));
  $("status").textContent = "Copied";
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    write($("prompt").value);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});
$("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const target = step ? state.chosen + step : { Home: 0, End: state.spans.length - 1 }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  moveTo(target);
});
for (const kind of ["pointerover", "focusin", "click"]) {
  $("text").addEventListener(kind, (event) => {
    if (event.target.dataset?.index) inspect(Number(event.target.dataset.index));
  });
}
for (const name of RANGES) $(name).addEventListener("input", showRanges);
$("reset").addEventListener("click", () => {
  for (const name of [...RANGES, "seed", "stop-at"]) $(name).value = $(name).defaultValue;
  showRanges();
});
$("chat").addEventListener("change", showLabel);
$("shade").addEventListener("change", () => document.body.classList.toggle("shade", $("shade").checked));
$("mono").addEventListener("change", () => document.body.classList.toggle("mono", $("mono").checked));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("bitnet-key", $("key").value);
  $("key").value = "";
  showError("");
  connect();
});
if (matchMedia("(max-width: 820px)").matches) $("settings").open = $("inside").open = false;
showRanges();
connect();
