// The page of `blt serve`: one completion at a time, drawn as it streams.
//
// Every byte comes with the entropy of the model's prediction before it, and whether a patch starts with it. A cell of
// the text is one character; under it is one bar a byte. Text is only ever set as text, since a model may write HTML.

const SCALE = 4; // nats at the top of a bar
const $ = (id) => document.getElementById(id);
const numbers = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const hex = (byte) => byte.toString(16).padStart(2, "0");

// --- from bytes to characters --------------------------------------------------------------------------------

const utf8 = new TextDecoder("utf-8", { fatal: true });

function decoded(bytes) {
  try {
    return utf8.decode(Uint8Array.from(bytes));
  } catch {
    return null;
  }
}

const lengthOf = (lead) =>
  lead < 0x80 ? 1 : lead >= 0xc2 && lead <= 0xdf ? 2 : lead >= 0xe0 && lead <= 0xef ? 3 : lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;

/** Groups byte records into characters. A byte that is no UTF-8 is a character of its own, with text null. */
class Characters {
  held = [];

  push(record) {
    const made = [];
    if (this.held.length && (record.byte & 0xc0) !== 0x80) made.push(...this.flush());
    this.held.push(record);
    const wanted = lengthOf(this.held[0].byte);
    if (wanted === 0) made.push(...this.flush());
    else if (this.held.length === wanted) {
      const text = decoded(this.held.map((each) => each.byte));
      if (text === null) made.push(...this.flush());
      else made.push({ text, records: this.held.splice(0) });
    }
    return made;
  }

  flush() {
    return this.held.splice(0).map((record) => ({ text: null, records: [record] }));
  }
}

// --- the drawing ---------------------------------------------------------------------------------------------

class Drawing {
  constructor(root, prompt, threshold) {
    this.root = root;
    this.threshold = threshold;
    this.characters = new Characters();
    this.waiting = [];
    this.records = [];
    this.patches = 0;
    root.replaceChildren();
    root.classList.toggle("limited", threshold !== null);
    if (threshold !== null) root.style.setProperty("--limit", String(Math.min(1, threshold / SCALE)));
    const before = document.createElement("span");
    before.className = "prompt";
    before.textContent = prompt;
    root.append(before);
  }

  add(bytes, entropies, starts) {
    for (let i = 0; i < bytes.length; i++) {
      this.patches += starts[i];
      const record = { at: this.records.length, byte: bytes[i], entropy: entropies[i], starts: starts[i], patch: this.patches };
      this.records.push(record);
      this.waiting.push(...this.characters.push(record));
    }
    this.schedule();
  }

  end() {
    this.waiting.push(...this.characters.flush());
    this.schedule();
  }

  schedule() {
    if (this.waiting.length && !this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const follow = this.root.scrollHeight - this.root.scrollTop - this.root.clientHeight < 40;
    const made = document.createDocumentFragment();
    for (const character of this.waiting.splice(0)) {
      made.append(this.cell(character));
      if (character.text === "\n") made.append(document.createElement("br"));
    }
    this.root.append(made);
    if (follow) this.root.scrollTop = this.root.scrollHeight;
  }

  cell({ text, records }) {
    const first = records[0], cell = document.createElement("span");
    cell.className = `cell${first.patch % 2 ? "" : " even"}${first.starts ? " starts" : ""}${text === null ? " bad" : ""}`;
    cell.dataset.at = String(first.at);
    const shown = document.createElement("span");
    shown.textContent = text === null ? `\\x${hex(first.byte)}` : SHOWN[text] ?? (/\p{C}/u.test(text) ? "\u25a1" : text);
    const bars = document.createElement("span");
    bars.className = "bars";
    bars.ariaHidden = "true";
    for (const record of records) bars.append(this.bar(record, record !== first));
    cell.append(shown, bars);
    return cell;
  }

  bar({ entropy, starts }, inside) {
    const bar = document.createElement("i");
    if (entropy !== null) bar.style.setProperty("--e", String(Math.min(1, entropy / SCALE)));
    bar.classList.toggle("high", entropy !== null && this.threshold !== null && entropy > this.threshold);
    bar.classList.toggle("starts", starts && inside);
    return bar;
  }

  /** What is known about the character whose first byte is at `at`, as one line. */
  detail(at) {
    const record = this.records[at], same = this.records.filter((each) => each.patch === record.patch);
    const bytes = [];
    for (let i = at; i < this.records.length && (i === at || (this.records[i].byte & 0xc0) === 0x80); i++) bytes.push(this.records[i]);
    const entropies = bytes.map((each) => (each.entropy === null ? "–" : each.entropy.toFixed(3))).join(", ");
    return `byte ${at + 1}: ${bytes.map((each) => `0x${hex(each.byte)}`).join(" ")}, entropy ${entropies} nats, in a patch of ${same.length} bytes`;
  }
}

const SHOWN = { "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", " ": "\u00a0" };

// --- the request ---------------------------------------------------------------------------------------------

let running = null;
let threshold = null;
let drawing = null;

const headers = () => ({ "Content-Type": "application/json", ...($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {}) });

function body() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const stop = $("stop").value.replaceAll("\\n", "\n");
  return {
    prompt: $("prompt").value, max_tokens: number("max_tokens"), temperature: number("temperature"), top_p: number("top_p"),
    top_k: number("top_k"), min_p: number("min_p"), seed: number("seed"), stop: stop || undefined, stream: true,
    stream_options: { include_usage: true }, return_patches: true,
  };
}

/** The events of a stream, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function refusal(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not an answer of this server: the status has to do
  }
  if (response.status === 401) $("key-field").hidden = false;
  const after = response.headers.get("retry-after");
  return new Error(response.status === 429 && after ? `${message} (retry in ${after} s)` : message);
}

async function generate() {
  if (running || !$("form").reportValidity()) return;
  running = new AbortController();
  const started = performance.now(), counts = { bytes: 0, patches: 0, first: null };
  state("generating…", true);
  show("");
  drawing = new Drawing($("text"), $("prompt").value, threshold);
  let finish = "";
  try {
    const response = await fetch("v1/completions", { method: "POST", headers: headers(), body: JSON.stringify(body()), signal: running.signal });
    if (!response.ok) throw await refusal(response);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      const { bytes, entropies, starts } = choice.patches;
      if (bytes.length) counts.first ??= performance.now() - started;
      counts.bytes += bytes.length;
      counts.patches += starts.filter(Boolean).length;
      drawing.add(bytes, entropies, starts);
      stats(counts, started);
    }
    state(finish === "length" ? "done: the length was reached" : "done: the model or a stop string ended the text", false);
  } catch (error) {
    if (error.name === "AbortError") state("stopped", false);
    else {
      state("", false);
      show(error instanceof TypeError ? "the server cannot be reached" : error.message);
    }
  } finally {
    drawing.end();
    running = null;
  }
}

function stats({ bytes, patches, first }, started) {
  const seconds = (performance.now() - started - (first ?? 0)) / 1000;
  $("bytes").textContent = numbers.format(bytes);
  $("speed").textContent = bytes > 1 && seconds > 0.05 ? Math.round((bytes - 1) / seconds).toLocaleString("en") : "–";
  $("first").textContent = first === null ? "–" : `${Math.round(first)} ms`;
  $("patch").textContent = patches ? numbers.format(bytes / patches) : "–";
}

function state(text, busy) {
  $("status").textContent = text;
  $("generate").disabled = busy;
  $("stop-button").disabled = !busy;
}

function show(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// --- the controls --------------------------------------------------------------------------------------------

async function describe() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return show((await refusal(response)).message);
  const [model] = (await response.json()).data;
  $("model").textContent = model.id;
  $("max_tokens").max = String(model.max_model_len);
  const rule = model.patch_rule ?? {};
  threshold = rule.scheme === "entropy" && !rule.monotonic ? rule.threshold : null;
  $("threshold-key").hidden = threshold === null;
  if (threshold !== null) $("threshold").textContent = `${numbers.format(threshold)} nats`;
}

$("scale").textContent = String(SCALE);
for (const output of document.querySelectorAll("output")) {
  const input = $(output.htmlFor.value), update = () => (output.textContent = Number(input.value).toFixed(2));
  input.addEventListener("input", update);
  update();
}
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop-button").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  if (event.key === "Escape") running?.abort();
});
$("text").addEventListener("pointerover", (event) => {
  const cell = event.target.closest(".cell");
  if (cell && drawing) $("detail").textContent = drawing.detail(Number(cell.dataset.at));
});
$("key").addEventListener("change", describe);
describe().catch(() => show("the server cannot be reached"));
