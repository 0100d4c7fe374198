/** blt-runtime: runs bundles of `blt export` in node and in browsers. */

/** A folder (node), a URL, or the files of a folder that the reader of a page has chosen. */
export type BundleSource = string | URL | Iterable<File>;

export interface OpenOptions {
  /** The module `onnxruntime-node` or `onnxruntime-web`. By default the installed one is imported. */
  ort?: unknown;
  /** Threads of one call. In browsers more than one needs a cross-origin isolated page. */
  threads?: number;
  /** "sizes" compares sizes only; "auto" also sha256 in bundles up to 1 GiB; "full" in all. Default: "auto". */
  verify?: "auto" | "full" | "sizes";
  /** Receives the bytes read so far, and all that will be read. */
  progress?: (done: number, total: number) => void;
  /** Stops reading: `open` then throws `Cancelled`. */
  signal?: AbortSignal;
  /** Further options of `InferenceSession.create`. */
  session?: object;
}

export interface StreamOptions {
  /** Begin with BOS, also after `reset`. Default: true. */
  bos?: boolean;
  /** Of draws that set no seed. */
  seed?: number | bigint;
}

export interface GenerateOptions {
  /** 0 chooses the most likely byte; otherwise a byte is drawn. Default: 0.8. */
  temperature?: number;
  /** Draw from this many most likely bytes. */
  topK?: number | null;
  /** Draw from the smallest set of most likely bytes with this share of the probability. */
  topP?: number | null;
  /** Drop bytes with less than this share of the most likely byte's probability. */
  minP?: number | null;
  /** Makes the draws repeatable. Equal seeds draw the same numbers as in Python. */
  seed?: number | bigint | null;
  /** End before this text, or before the first of several. */
  stop?: string | Uint8Array | (string | Uint8Array)[] | null;
  /** End where the model writes an end of document; false reads it and goes on. Default: true. */
  stopAtEos?: boolean;
  /** Stops the generation: the iterator then throws `Cancelled`. */
  signal?: AbortSignal | null;
}

export interface Token {
  /** 4 to 259 for a byte, less for a special id; null for the bytes that were held back until the text ended. */
  id: number | null;
  /** The bytes that the token releases: none while they may begin a stop string. */
  bytes: Uint8Array;
  /** The entropy model's, in nats, before this token; NaN without one. */
  entropy: number;
  startsPatch: boolean;
}

/** A bundle that is ready to run. Streams of one model may run at the same time. */
export class Model {
  private constructor();
  /** Throws BundleError, BackendError, UsageError or Cancelled. */
  static open(from: BundleSource, options?: OpenOptions): Promise<Model>;
  /** manifest.json, checked. */
  readonly manifest: Record<string, unknown>;
  /** A new stream. */
  stream(options?: StreamOptions): Promise<Stream>;
  /** Text that continues `prompt`, up to `n` bytes, in whole characters (invalid bytes become U+FFFD). */
  generateText(prompt: string | Uint8Array, n: number, options?: GenerateOptions): AsyncGenerator<string, void>;
}

/** One text with its state. One call at a time. */
export class Stream {
  private constructor();
  /** Tokens read, BOS included. */
  readonly position: number;
  /** The tokens read (a copy). */
  readonly ids: number[];
  /** Entropy in nats of the byte after each token; NaN where the patch rule needs none (a copy). */
  readonly entropies: Float32Array;
  /** They sum to position + 1: the last patch holds the next byte, too. */
  readonly patchLengths: number[];
  /** Of the next id. Throws UsageError if the stream is empty. */
  readonly logits: Float32Array;
  /** Appends text or bytes, all or nothing. Throws CapacityError or Cancelled: the stream is then unchanged. */
  append(text: string | Uint8Array, options?: { signal?: AbortSignal }): Promise<void>;
  /** The same for ids: a byte's is the byte plus 4, BOS is 1, EOS is 2. Throws InputError for others. */
  appendIds(ids: Iterable<number>, options?: { signal?: AbortSignal }): Promise<void>;
  /** Up to `n` tokens. The stream has read each when it is yielded. */
  tokens(n: number, options?: GenerateOptions): AsyncGenerator<Token, void>;
  /** The bytes of `tokens`, in pieces. */
  generate(n: number, options?: GenerateOptions): AsyncGenerator<Uint8Array, void>;
  /** `generate` in whole characters. */
  generateText(n: number, options?: GenerateOptions): AsyncGenerator<string, void>;
  /** Forgets everything and begins again. */
  reset(): Promise<void>;
}

/** Base of all errors of this module: one line that says what is wrong and what to do. */
export class BltError extends Error {}
/** A bad argument, or two calls on one stream at the same time. */
export class UsageError extends BltError {}
/** Ids that cannot be used. */
export class InputError extends BltError {}
/** A bundle with a missing, changed or contradictory file. */
export class BundleError extends BltError {}
/** The stream cannot hold more bytes or patches; it is unchanged. */
export class CapacityError extends BltError {}
/** ONNX Runtime is missing, too old, or cannot run a graph. */
export class BackendError extends BltError {}
/** A signal stopped the call; the stream is unchanged. Its `name` is "AbortError". */
export class Cancelled extends BltError {}
