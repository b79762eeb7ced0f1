// Runs a bundle's graphs in Node, for Python: frames on stdin are calls, frames on stdout are the results.
//
//     node node.js BUNDLE        a frame: length of a JSON text in 4 bytes, the text, then the bytes of the arrays it lists
//
// nsm.runtimes.backends.web starts it, so that nsm checks and measures the code that a browser runs.

import { readFile } from "node:fs/promises";
import { join as joinPath } from "node:path";

import { record, typeOf } from "./arrays.js";
import { Bundle } from "./bundle.js";
import { join } from "./npz.js";
import { Runtime } from "./runtime.js";

/** @typedef {import("./arrays.js").Arrays} Arrays */

/** Return a reader of files in a folder. @param {string} folder @returns {import("./bundle.js").Reader} */
export function fromFolder(folder) {
  return async (path) => new Uint8Array(await readFile(joinPath(folder, path)));
}

/** Loads ONNX Runtime Web from this file's folder, on one thread, as on a server without special headers. */
export async function loadOrt() {
  // @ts-ignore: the builder puts it there
  const ort = await import("./ort/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  return ort;
}

/** @param {any} head @param {Arrays} arrays */
function frame(head, arrays) {
  const listed = Object.entries(arrays).map(([name, { dtype, shape, data }]) => ({ name, dtype, shape, bytes: data.byteLength }));
  const text = new TextEncoder().encode(JSON.stringify({ ...head, arrays: listed }));
  const length = new Uint8Array(new Uint32Array([text.length]).buffer);
  const parts = Object.values(arrays).map(({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  return join([length, text, ...parts]);
}

/** @param {AsyncIterable<Uint8Array>} stream @returns {AsyncGenerator<[any, Arrays]>} */
async function* frames(stream) {
  let held = new Uint8Array(0);
  const chunks = stream[Symbol.asyncIterator]();
  const take = async (/** @type {number} */ count) => {
    const parts = [held];
    for (let have = held.length; have < count; ) {
      const { value, done } = await chunks.next();
      if (done) return null;
      parts.push(value);
      have += value.length;
    }
    const joined = parts.length === 1 ? held : join(parts);
    held = joined.subarray(count);
    return joined.slice(0, count);
  };
  for (;;) {
    const length = await take(4);
    if (length === null) return;
    const text = await take(new DataView(length.buffer).getUint32(0, true));
    if (text === null) return;
    const head = JSON.parse(new TextDecoder().decode(text));
    const arrays = record();
    for (const { name, dtype, shape, bytes } of head.arrays) {
      const data = await take(bytes);
      if (data === null) return;
      arrays[name] = { data: new (typeOf(dtype))(data.buffer), shape, dtype };
    }
    yield [head, arrays];
  }
}

/** @param {string} folder */
async function serve(folder) {
  const runtime = new Runtime(await loadOrt(), await Bundle.open(fromFolder(folder)));
  const operations = {
    load: (/** @type {any} */ _, /** @type {Arrays} */ arrays) => (runtime.loadState(arrays), record()),
    read: () => runtime.readState(),
    call: (/** @type {any} */ head, /** @type {Arrays} */ arrays) => runtime.call(head.entry, arrays),
  };
  for await (const [head, arrays] of frames(process.stdin)) {
    let reply;
    try {
      const found = await operations[/** @type {keyof typeof operations} */ (head.op)](head, arrays);
      reply = frame({ ok: true, finite: runtime.finite(head.op === "call" ? found : record()) }, found);
    } catch (error) {
      reply = frame({ ok: false, error: String(error instanceof Error ? error.message : error) }, record());
    }
    if (!process.stdout.write(reply)) await new Promise((resolve) => process.stdout.once("drain", resolve));
  }
}

if (process.argv[2] !== undefined && import.meta.url.endsWith("/node.js") && process.argv[1].endsWith("node.js")) {
  await serve(process.argv[2]);
}
