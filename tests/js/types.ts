// A program that uses every declaration of blt.d.ts; it is compiled, not run.

import { BltError, BackendError, BundleError, Cancelled, CapacityError, InputError, Model, UsageError } from "blt-runtime";
import type { BundleSource, GenerateOptions, OpenOptions, Stream, StreamOptions, Token } from "blt-runtime";

const { signal } = new AbortController();
const sources: BundleSource[] = ["folder", new URL("https://example.org/bundle/"), [new File([], "manifest.json")]];
const opening: OpenOptions = { ort: {}, threads: 1, verify: "sizes", signal, session: { enableProfiling: true },
  progress: (done, total) => console.log(done / total) };
const options: GenerateOptions = { temperature: 0.7, topK: 40, topP: 0.9, minP: 0.01, seed: 1n, signal,
  stop: ["\n\n", new Uint8Array([0])], stopAtEos: false };
const nothing: GenerateOptions = { topK: null, topP: undefined, minP: null, seed: null, stop: null, signal: null };
const beginning: StreamOptions = { bos: true, seed: 1 };

export async function main(input: HTMLInputElement): Promise<number> {
  const model: Model = await Model.open(input.files ? Array.from(input.files) : "bundle", opening);
  for await (const text of model.generateText("Once", 9, options)) console.log(text.toUpperCase());
  console.log(model.manifest.format, sources.length);
  const stream: Stream = await model.stream(beginning);
  await stream.append(new Uint8Array([65]), { signal: AbortSignal.timeout(1000) });
  await stream.appendIds([69, 2]);
  const told: Token[] = [];
  for await (const token of stream.tokens(9, nothing)) told.push(token);
  for (const { id, bytes, entropy, startsPatch } of told) console.log((id ?? 0) + bytes.length + entropy, !startsPatch);
  for await (const bytes of stream.generate(9)) console.log(bytes.length);
  for await (const text of stream.generateText(9)) console.log(text.length);
  await stream.reset();
  // @ts-expect-error: options are written as in JavaScript
  stream.generate(1, { top_k: 3 });
  // @ts-expect-error: models are opened
  new Model();
  // @ts-expect-error: a position is read, not set
  stream.position = 3;
  return stream.position + stream.ids.length + stream.entropies.length + stream.patchLengths.length + stream.logits.length;
}

export const known: (typeof BltError)[] = [BackendError, BundleError, Cancelled, CapacityError, InputError, UsageError];
