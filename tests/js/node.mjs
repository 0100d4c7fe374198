// node node.mjs MODULE LIBRARY: reads jobs {bundle, cases} from standard input and prints their results, as JSON.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { createRequire } from "node:module";
import { drive } from "./drive.mjs";

const [, , module, library] = process.argv;
const blt = await import(pathToFileURL(module));
const ort = await import(pathToFileURL(createRequire(pathToFileURL(module)).resolve(library)));
const results = [];
for (const { bundle, cases } of JSON.parse(readFileSync(0, "utf8")))
  results.push(await drive(blt, bundle, { ort, threads: 1 }, cases).catch((error) => `${error.name}: ${error.message}`));
console.log(JSON.stringify(results));
