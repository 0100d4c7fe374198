// Text with its patches and entropies, drawn as it streams; for this page and for the demo of runtime/js.
//
// Every byte comes with the entropy of the model's prediction before it, and whether a patch starts with it. A cell of
// the text is one character; under it is one bar a byte. Text is only ever set as text, since a model may write HTML.

export const SCALE = 4; // nats at the top of a bar
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

export class Drawing {
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
