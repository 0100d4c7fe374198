/** Ids and bytes outside the graphs: hash n-grams, patches, the choice of the next id, stop strings. */

import { BundleError, UsageError, isWhole, shown } from "./bundle.js";

export const [BOS, EOS, BPE, OFFSET, NEWLINE] = [1, 2, 3, 4, 14]; // a byte's id is the byte plus OFFSET
const PRIMES = [1000000007n, 5915587277n, 1500450271n, 3267000013n, 5754853343n, 4093082899n, 9576890767n,
  3628273133n, 2860486313n, 5463458053n, 3367900313n];

// ---- hash n-grams: the sum of id * prime^i, wrapping in 64 bits, floor modulo the rows of a table

const DTYPES = { float32: "<f4", float16: "<f2", bfloat16: "<u2", int8: "|i1" }; // as .npy writes them

export class HashEmbedding {
  #coefficients = []; // [table][place], the oldest first
  #rows;
  #add;
  /** `file`: the .npy of all tables, [tables * rows, dim], with a float32 scale after each row of int8. */
  constructor(spec, file) {
    const { sizes, functions, rows, dim, dtype } = spec;
    this.dim = dim;
    this.#rows = BigInt(rows);
    for (let f = 0; f < functions; f++)
      for (const size of sizes) {
        const powers = [1n];
        for (let i = 1; i < size; i++) powers.push(BigInt.asIntN(64, powers[i - 1] * PRIMES[f]));
        this.#coefficients.push(powers);
      }
    const width = dtype === "int8" ? dim + 4 : dim;
    const begin = npyBegin(file, DTYPES[dtype], this.#coefficients.length * rows, width);
    this.#add = adder(dtype, file.buffer, file.byteOffset + begin, dim);
  }
  /** The embedding of position t into `out`: table rows, added in the order of the tables in float32. */
  embed(ids, t, out) {
    out.fill(0);
    for (let k = 0; k < this.#coefficients.length; k++) {
      const powers = this.#coefficients[k], first = t - powers.length + 1;
      let sum = 0n;
      for (let i = Math.max(0, -first); i < powers.length; i++) sum += BigInt(ids[first + i]) * powers[i];
      const row = BigInt.asIntN(64, sum) % this.#rows;
      this.#add(k * Number(this.#rows) + Number(row < 0n ? row + this.#rows : row), out);
    }
  }
}

/** Where the numbers of an .npy file begin. Throws unless it holds [rows, width] of that type. */
function npyBegin(file, descr, rows, width) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength), two = file[6] === 2;
  const start = two ? 12 : 10, begin = start + (two ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder("latin1").decode(file.subarray(start, begin));
  const found = /'descr': '([^']+)', 'fortran_order': False, 'shape': \((\d+), (\d+)\)/.exec(header);
  const size = descr === "<f4" ? 4 : descr === "|i1" ? 1 : 2;
  if (new TextDecoder("latin1").decode(file.subarray(1, 6)) !== "NUMPY" || found?.[1] !== descr ||
    Number(found[2]) !== rows || Number(found[3]) !== width || begin + rows * width * size !== file.byteLength)
    throw new BundleError("the file of the hash tables does not hold what the manifest lists: export the bundle again");
  return begin;
}

/** A function that adds a row to `out` [dim] float32. */
function adder(dtype, buffer, offset, dim) {
  if (dtype === "int8") {
    const codes = new Int8Array(buffer, offset), view = new DataView(buffer, offset);
    return (row, out) => {
      const at = row * (dim + 4), scale = view.getFloat32(at + dim, true);
      for (let i = 0; i < dim; i++) out[i] += Math.fround(codes[at + i] * scale);
    };
  }
  let wide = (value) => value;
  if (dtype === "float16") wide = ((table) => (half) => table[half])(halves());
  if (dtype === "bfloat16") {
    const word = new Uint32Array(1), float = new Float32Array(word.buffer);
    wide = (half) => ((word[0] = half << 16), float[0]);
  }
  const stored = dtype === "float32" ? new Float32Array(buffer, offset) : new Uint16Array(buffer, offset);
  return (row, out) => {
    for (let i = 0, at = row * dim; i < dim; i++, at++) out[i] += wide(stored[at]);
  };
}

/** The value of every float16. */
function halves() {
  return Float32Array.from({ length: 65536 }, (_, half) => {
    const exponent = (half >> 10) & 31, fraction = half & 1023, sign = half & 32768 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
  });
}

// ---- where patches end

function toBfloat16(value) {
  if (Number.isNaN(value)) return value;
  const float = new Float32Array([value]), word = new Uint32Array(float.buffer);
  word[0] = (word[0] + 0x7fff + ((word[0] >>> 16) & 1)) & 0xffff0000;
  return float[0];
}

export class PatchState {
  constructor(rule) {
    this.rule = rule;
    this.position = this.open = this.previous = 0;
    this.space = true;
    this.round = rule.entropy_dtype === "bfloat16" ? toBfloat16 : Math.fround;
    this.limit = this.round(rule.threshold ?? 0);
    this.rise = this.round(rule.threshold_add ?? 0);
  }
  copy() {
    return Object.assign(new PatchState(this.rule), this);
  }
  /** Reads the next id and its entropy in nats. True if its patch ends there. */
  closes(id, entropy) {
    let closes = this.#scheme(id, entropy) || this.position === 0;
    this.position++;
    this.open++;
    closes ||= this.rule.max_patch_length != null && this.open >= this.rule.max_patch_length;
    if (closes) this.open = 0;
    return closes;
  }
  #scheme(id, entropy) {
    const { scheme, patch_size: size } = this.rule;
    if (scheme === "entropy") return this.#entropy(this.round(entropy));
    if (scheme === "space") {
      const before = this.space, byte = id - OFFSET, letter = (byte | 32) >= 97 && (byte | 32) <= 122;
      this.space = byte < 0 || !((byte >= 48 && byte <= 57) || letter || (byte >= 0x80 && byte <= 0xbf));
      return byte < 0 || (this.space && !before);
    }
    return scheme === "static" ? this.position % size === 0 : scheme === "byte" || id === BPE;
  }
  #entropy(entropy) {
    const { monotonic, threshold_add: add } = this.rule;
    if (!monotonic && add == null) return entropy > this.limit;
    const rise = this.round(Math.fround(entropy - this.previous));
    this.previous = entropy;
    if (this.position === 1) return true; // as facebookresearch/blt: a patch at 2, and with threshold_add none at 3
    return monotonic ? rise > this.limit : this.position > 2 && entropy > this.limit && rise > this.rise;
  }
}

// ---- choosing the next id, and where a text stops

/** numpy's default_rng(seed).random(): PCG64, seeded by a SeedSequence. Equal seeds draw equal numbers as in Python. */
export class Random {
  constructor(seed = null) {
    let words = [...crypto.getRandomValues(new Uint32Array(4))];
    if (seed !== null) for (words = []; seed || !words.length; seed >>= 32n) words.push(Number(seed & 0xffffffffn));
    const hasher = (constant, factor) => (value) => {
      value ^= constant;
      constant = Math.imul(constant, factor);
      value = Math.imul(value, constant);
      return value ^ (value >>> 16);
    };
    const mix = (x, y) => ((x = Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)), x ^ (x >>> 16));
    const hash = hasher(0x43b0d7e5, 0x931e8875), pool = [0, 1, 2, 3].map((i) => hash(words[i] ?? 0));
    for (let i = 0; i < 4; i++) for (let j = 0; j < 4; j++) if (i !== j) pool[j] = mix(pool[j], hash(pool[i]));
    for (const word of words.slice(4)) for (let j = 0; j < 4; j++) pool[j] = mix(pool[j], hash(word));
    const draw = hasher(0x8b51f9dd, 0x58f38ded), state = [...pool, ...pool].map((word) => BigInt(draw(word) >>> 0));
    const pair = (i) => (state[i + 1] << 96n) | (state[i] << 64n) | (state[i + 3] << 32n) | state[i + 2];
    this.increment = BigInt.asUintN(128, (pair(4) << 1n) | 1n);
    this.state = this.increment + pair(0);
    this.#step();
  }
  #step() {
    this.state = BigInt.asUintN(128, this.state * 0x2360ed051fc65da44385df649fccf645n + this.increment);
  }
  /** A number from 0 up to, but not including, 1. */
  next() {
    this.#step();
    const mixed = BigInt.asUintN(64, (this.state >> 64n) ^ this.state), turn = this.state >> 122n;
    return Number(BigInt.asUintN(64, (mixed >> turn) | (mixed << (64n - turn))) >> 11n) / 2 ** 53;
  }
}

export const seedOf = (seed) => {
  if (seed == null) return null;
  if (typeof seed === "bigint" ? seed < 0n : !isWhole(seed))
    throw new UsageError(`seed must be a whole number from 0 up, not ${shown(seed)}`);
  return BigInt(seed);
};

/** A function from logits [V] to an id: the largest at temperature 0, else a draw. Ties go to the lower id. */
export function sampler({ temperature, topK, topP, minP }, random) {
  if (temperature === 0) return (logits) => logits.reduce((best, value, id) => (value > logits[best] ? id : best), 0);
  return (logits) => {
    const scaled = Array.from(logits, (value) => value / Math.max(temperature, 1e-6));
    const order = [...scaled.keys()].sort((a, b) => scaled[b] - scaled[a] || a - b).slice(0, topK ?? undefined);
    const mass = order.map((id) => Math.exp(scaled[id] - scaled[order[0]]));
    const total = mass.reduce((sum, value) => sum + value, 0);
    let sum = 0;
    const sums = mass.map((value) => (sum += value / total));
    let keep = order.length;
    if (topP != null) keep = Math.min(keep, sums.filter((value) => value < topP).length + 1);
    if (minP != null) keep = Math.min(keep, mass.filter((value) => value >= minP * mass[0]).length);
    const drawn = random.next() * sums[keep - 1], at = sums.findIndex((value) => value > drawn);
    return order[at < 0 ? keep - 1 : Math.min(at, keep - 1)];
  };
}

const text8 = new TextEncoder();
/** UTF-8 of a text (lone surrogates are dropped), or the bytes themselves. */
export function toBytes(text, what = "the text") {
  if (typeof text === "string") return text8.encode(text.replace(/\p{Surrogate}/gu, ""));
  if (text instanceof Uint8Array) return text;
  throw new UsageError(`${what} must be a string or a Uint8Array, not ${shown(text)}`);
}

/** Holds back bytes that may begin a stop string. Bytes are characters of strings here, which can be searched. */
export class StopMatcher {
  #stops;
  #held = "";
  stopped = false;
  constructor(stops) {
    const listed = stops == null ? [] : Array.isArray(stops) ? stops : [stops];
    this.#stops = listed.map((stop) => String.fromCharCode(...toBytes(stop, "a stop string")));
    if (this.#stops.includes("")) throw new UsageError("a stop string must not be empty");
  }
  /** Bytes that are certainly before any stop string. */
  feed(byte) {
    this.#held += byte;
    const found = this.#stops.map((stop) => [this.#held.indexOf(stop), stop.length]).filter(([at]) => at >= 0);
    if (found.length) {
      found.sort(([a, long], [b, longer]) => a + long - b - longer || a - b); // the first to end, the longest of those
      this.stopped = true;
      this.#held = this.#held.slice(0, found[0][0]);
      return this.flush();
    }
    let keep = 0;
    for (const stop of this.#stops)
      for (let n = Math.min(stop.length - 1, this.#held.length); n > keep; n--)
        if (this.#held.endsWith(stop.slice(0, n))) keep = n;
    return this.flush(keep);
  }
  /** The bytes held back, but for the last `keep`. */
  flush(keep = 0) {
    const end = this.#held.length - keep, out = Uint8Array.from(this.#held.slice(0, end), (c) => c.charCodeAt(0));
    this.#held = this.#held.slice(end);
    return out;
  }
}

const DEFAULTS = { temperature: 0.8, topK: null, topP: null, minP: null, seed: null, stop: null, stopAtEos: true,
  signal: null };

/** Options with their defaults. Throws UsageError for an unknown one and for a value out of range. */
export function checkOptions(given = {}) {
  const set = Object.entries(given).filter(([, value]) => value !== undefined);
  const options = { ...DEFAULTS, ...Object.fromEntries(set) };
  const demand = (holds, name, wanted) => {
    if (!holds) throw new UsageError(`${name} must be ${wanted}, not ${shown(options[name])}`);
  };
  for (const name of Object.keys(given))
    if (!(name in DEFAULTS)) throw new UsageError(`unknown option ${name}; known: ${Object.keys(DEFAULTS).join(", ")}`);
  const { temperature, topK, topP, minP, stopAtEos } = options;
  demand(Number.isFinite(temperature) && temperature >= 0, "temperature", "a number from 0 up");
  demand(topK === null || isWhole(topK, 1), "topK", "a whole number of at least 1");
  demand(topP === null || (topP > 0 && topP <= 1), "topP", "a number above 0 and at most 1");
  demand(minP === null || (minP >= 0 && minP <= 1), "minP", "a number between 0 and 1");
  demand(typeof stopAtEos === "boolean", "stopAtEos", "true or false");
  return { ...options, seed: seedOf(options.seed) };
}

