// A session over a bundle, in a browser or in Node: any split of a stream, lanes, and snapshots that Python reads.
//
//     import * as ort from "onnxruntime-web/wasm";
//     import { fromUrl, open } from "./nsm.js";
//     const session = await open(fromUrl("model.nsm"), ort);
//     const outputs = await session.feed([[72, 105]]);        // [B, T] ids -> {outputs: {data, shape, dtype}}

import { copyOf, isFloat, putAt, record, sameBytes, sizeOf, takeAt, typeOf, zeros } from "./arrays.js";
import { Bundle, fromUrl, sha256 } from "./bundle.js";
import { BundleError, InputError, NonFiniteError, SnapshotError, StreamError } from "./errors.js";
import { LaneTokens } from "./lane_tokens.js";
import { join, readNpz, writeNpz } from "./npz.js";
import { Runtime } from "./runtime.js";

export * from "./errors.js";
export { Bundle, fromUrl };

/** @typedef {import("./arrays.js").NdArray} NdArray */
/** @typedef {import("./arrays.js").Arrays} Arrays */
/** Ids [[...], ...] by lane, or vectors [[[...], ...], ...], or an array with its shape. @typedef {NdArray | any[]} Tokens */

const VALID = "valid";
const OFFSET = "lane.offset";
const SNAPSHOT_VERSION = 2;
const MAGIC = new TextEncoder().encode(`nsm-snapshot ${SNAPSHOT_VERSION}\n`);
const DECODES_PER_STEP = 4; // a call of step takes about as long as decode takes for 1 / 4 of a chunk
const FREE_RUN_BUDGET = 1e-4; // of fp32, see runtimes/parity/budgets.py

/**
 * Opens a bundle. Throws if its artifact failed the parity check, unless `allowFailed` is true.
 * @param {import("./bundle.js").Reader} read @param {any} ort onnxruntime-web @param {{allowFailed?: boolean}} options
 * @returns {Promise<Session>}
 */
export async function open(read, ort, { allowFailed = false } = {}) {
  const bundle = await Bundle.open(read);
  const failed = bundle.manifest.artifacts.some((/** @type {any} */ item) => item.target === "web" && item.parity?.status === "failed");
  if (failed && !allowFailed) {
    throw new BundleError(
      "The artifact web failed its parity check: its outputs are not those of the model. Export the model again. " +
        "To open it anyway: {allowFailed: true}.",
    );
  }
  return new Session(new Runtime(ort, bundle), bundle, await bundle.initial());
}

/** B streams on one bundle, one call at a time: await each call before the next one. */
export class Session {
  /** @param {Runtime} runtime @param {Bundle} bundle @param {Arrays} initial */
  constructor(runtime, bundle, initial) {
    this.runtime = runtime;
    this.bundle = bundle;
    this.spec = bundle.spec;
    this.fingerprint = bundle.manifest.fingerprint;
    this.initial = initial;
    this._chunked = this.spec.states.some((/** @type {any} */ state) => state.name === OFFSET);
    this._tokens = bundle.capacity === null ? null : new LaneTokens(this.spec, bundle.capacity, initial);
    this.reset();
  }

  get batch() {
    return this.spec.batch;
  }

  /** Resets a lane (default: all) to the initial state. @param {number} [lane] */
  reset(lane) {
    if (lane === undefined) this._put(this.initial, Array(this.batch).fill(0));
    else {
      const whole = this._replaced(lane, (state) => takeAt(this.initial[state.name], state.batch_axis, lane));
      this._put(whole, this._tokens && this._tokens.used.map((used, index) => (index === lane ? 0 : used)));
    }
  }

  /** The number of tokens left until each lane needs a reset; null if unlimited. */
  get tokensLeft() {
    const tokens = this._tokens;
    return tokens && tokens.used.map((used) => Math.max(tokens.capacity - used, 0));
  }

  /**
   * Runs the graph step once, on lanes at the start of a chunk.
   * @param {Tokens} tokens [B, K, ...] @param {number[]} [valid] number of valid tokens of each lane @returns {Promise<Arrays>}
   */
  async step(tokens, valid) {
    const [inputs, counts] = this._checked("step", tokens, valid);
    const within = counts.map((count, lane) => (count > 0 && this.offsets[lane] > 0 ? lane : -1)).filter((lane) => lane >= 0);
    if (within.length) {
      throw new StreamError(
        `The streams on lanes [${within}] are inside a chunk of ${this.spec.chunk_size} tokens, and step starts at its ` +
          "start. Use feed, which aligns any split, or reset these lanes.",
      );
    }
    this._tokens?.check(counts);
    const outputs = await this.runtime.call("step", inputs);
    this._tokens?.add(counts);
    if (this._chunked) this.offsets = this.offsets.map((offset, lane) => offset + (counts[lane] % this.spec.chunk_size));
    this._checkFinite(outputs, counts);
    return outputs;
  }

  /**
   * Runs one token per lane, anywhere in a chunk, and commits the chunks that become full.
   * @param {Tokens} tokens [B, 1, ...] @param {number[]} [valid] 1 or 0 for each lane @returns {Promise<Arrays>}
   */
  async decode(tokens, valid) {
    const [inputs, counts] = this._checked("decode", tokens, valid);
    this._tokens?.check(counts);
    await this._commitFull();
    const outputs = await this.runtime.call("decode", inputs);
    this._tokens?.add(counts);
    if (this._chunked) this.offsets = this.offsets.map((offset, lane) => offset + counts[lane]);
    await this._commitFull();
    this._checkFinite(outputs, counts);
    return outputs;
  }

  /**
   * Runs any number of tokens, from any offset of the lanes.
   * @param {Tokens} tokens [B, T, ...] @param {number[]} [valid] number of valid tokens of each lane (default: all)
   * @returns {Promise<Arrays>} [B, T, ...] by name; zero after the valid tokens of a lane
   */
  async feed(tokens, valid) {
    const entry = this.runtime.entry("step");
    const [spec] = entry.inputs;
    const given = this._array(spec, tokens);
    const wanted = ["B", "T", ...spec.shape.slice(2)];
    if (given.shape.length !== wanted.length || given.shape[0] !== this.batch || given.shape[1] < 1 ||
        spec.shape.slice(2).some((/** @type {number} */ size, /** @type {number} */ i) => given.shape[i + 2] !== size)) {
      throw new InputError(`feed takes tokens of shape [${wanted}], B = ${this.batch}; given [${given.shape}].`);
    }
    const length = given.shape[1];
    const counts = valid ?? Array(this.batch).fill(length);
    if (counts.length !== this.batch || counts.some((count) => !Number.isInteger(count) || count < 0 || count > length)) {
      throw new InputError(`valid takes a number in 0 .. ${length} for each of the ${this.batch} lanes; given [${counts}].`);
    }
    this._checkTokens(spec, given, counts);
    this._tokens?.check(counts);
    const partial = this.runtime.has("decode") || entry.inputs.some((/** @type {any} */ input) => input.name === VALID);
    if (!partial && counts.some((count) => count !== counts[0] || count % spec.shape[1])) {
      throw new InputError(`This model takes whole calls of ${spec.shape[1]} tokens, on all lanes; given [${counts}].`);
    }
    /** @type {Arrays} */
    const results = record();
    for (const item of entry.outputs) results[item.name] = zeros([this.batch, length, ...item.shape.slice(2)], item.dtype);
    const done = Array(this.batch).fill(0);
    while (done.some((count, lane) => count < counts[lane])) {
      const stepped = this._stepped(entry, counts.map((count, lane) => count - done[lane]));
      if (stepped.some(Boolean)) await this._part("step", given, done, stepped, results);
      const decoded = counts.map((count, lane) => (count > done[lane] && !stepped[lane] ? 1 : 0));
      if (this.runtime.has("decode") && decoded.some(Boolean)) await this._part("decode", given, done, decoded, results);
    }
    return results;
  }

  /** Returns a copy of the whole state by name, with all lanes. */
  readState() {
    return this.runtime.readState();
  }

  /** Replaces the whole state. @param {Arrays} arrays @param {number[]} [tokens] tokens of each lane since its reset, for a model with a capacity (default: read from a state that counts them) */
  loadState(arrays, tokens) {
    for (const state of this.spec.states) {
      const given = arrays[state.name];
      if (given === undefined || String(given.shape) !== String(state.shape)) {
        throw new InputError(`The state ${state.name} has the shape [${state.shape}]; given ${given ? `[${given.shape}]` : "none"}.`);
      }
    }
    this._put(arrays, this._tokens && this._tokens.given(tokens, arrays));
  }

  /** Serializes a lane (default: all), to continue elsewhere, in Python too. @param {number} [lane] @returns {Promise<Uint8Array>} */
  async snapshot(lane) {
    const whole = this.readState();
    /** @type {[string, NdArray | string][]} */
    const items = [["header", header(this.fingerprint, lane === undefined ? this.batch : null, this._had(lane))]];
    for (const state of this.spec.states) {
      const value = lane === undefined ? whole[state.name] : takeAt(whole[state.name], state.batch_axis, this._lane(lane));
      items.push([`state/${state.name}`, value]);
    }
    const payload = writeNpz(items);
    return join([MAGIC, fromHex(await sha256(payload)), payload]);
  }

  /** Restores a snapshot of one lane or of all. @param {Uint8Array} bytes @param {number} [lane] */
  async restore(bytes, lane) {
    if (!(bytes instanceof Uint8Array)) throw new SnapshotError("A snapshot is a Uint8Array; given something else.");
    const version = /^nsm-snapshot (\d{1,9})\n/.exec(new TextDecoder("latin1").decode(bytes.subarray(0, 24)));
    if (version && Number(version[1]) !== SNAPSHOT_VERSION) {
      throw new SnapshotError(`The snapshot has the format version ${version[1]}, and this client reads version ${SNAPSHOT_VERSION}.`);
    }
    const payload = bytes.subarray(MAGIC.length + 32);
    const start = bytes.subarray(0, MAGIC.length);
    const hash = bytes.subarray(MAGIC.length, MAGIC.length + 32);
    if (String(start) !== String(MAGIC) || String(hash) !== String(fromHex(await sha256(payload)))) {
      throw new SnapshotError("These bytes are not a snapshot, or they are damaged: the hash does not fit.");
    }
    const { arrays, texts } = readNpz(payload, "The snapshot");
    const { fingerprint, lanes, tokens } = JSON.parse(texts.header);
    if (fingerprint !== this.fingerprint) throw new SnapshotError("The snapshot is of another model.");
    if (lanes !== (lane === undefined ? this.batch : null)) {
      throw new SnapshotError(`The snapshot holds ${lanes === null ? "one lane" : `all ${lanes} lanes`}; the call restores others.`);
    }
    /** @type {Arrays} */
    const found = record();
    for (const state of this.spec.states) {
      const value = arrays[`state/${state.name}`];
      const shape = lane === undefined ? state.shape : state.shape.filter((/** @type {number} */ _, /** @type {number} */ i) => i !== state.batch_axis);
      if (value === undefined || String(value.shape) !== String(shape) || value.dtype !== state.dtype) {
        throw new SnapshotError(`The snapshot does not hold ${state.name} of shape [${shape}].`);
      }
      found[state.name] = value;
    }
    const whole = lane === undefined ? found : this._replaced(lane, (state) => found[state.name]);
    this._put(whole, this._tokens && this._tokens.restored(tokens, whole, lane));
  }

  /**
   * Replays the golden streams on the session's own state, and compares outputs and sampled states.
   * @param {(done: number, total: number) => void} [progress]
   * @returns {Promise<{passed: boolean, streams: number, steps: number, budget: number, worst: {tensor: string, error: number},
   *   errors: Record<string, number>, exact: number}>} the largest error of each tensor; `exact` counts integers that differ
   */
  async check(progress) {
    const { arrays } = await this.bundle.arrays("golden.npz");
    const tokens = arrays["inputs/tokens"];
    const valid = arrays["inputs/valid"];
    const [streams, steps] = tokens.shape;
    const kept = Object.entries(arrays).filter(([name]) => name.startsWith("after/")).map(([, value]) => value.shape[0])[0];
    const sampled = Array.from(arrays.sampled.data, Number);
    const usual = record();
    for (const [name, value] of Object.entries(arrays)) if (isFloat(value.dtype) && /^(outputs|after)\//.test(name)) usual[name] = rms(value);
    /** @type {Record<string, number>} */
    const errors = record();
    let exact = 0;
    const note = (/** @type {string} */ name, /** @type {NdArray} */ given, /** @type {NdArray} */ wanted) => {
      if (isFloat(wanted.dtype)) {
        const error = relativeError(given, wanted, usual[name]);
        const plain = name.slice(name.indexOf("/") + 1);
        if (!(error <= (errors[plain] ?? -1))) errors[plain] = error;
      } else if (!sameBytes(given, wanted)) exact += 1;
    };
    for (let first = 0; first < streams; first += this.batch) {
      this.reset();
      const lanes = Array.from({ length: this.batch }, (_, lane) => Math.min(first + lane, streams - 1));
      for (let step = 0; step < steps; step++) {
        const counts = valid && lanes.map((stream) => Number(valid.data[stream * steps + step]));
        const outputs = await this.step(stack(lanes.map((stream) => takeAt(takeAt(tokens, 0, stream), 0, step))), counts);
        const index = sampled.indexOf(step);
        const state = index >= 0 ? this.readState() : null;
        for (let lane = 0; lane < Math.min(this.batch, streams - first); lane++) {
          const stream = first + lane;
          for (const name of Object.keys(outputs)) {
            const wanted = takeAt(takeAt(arrays[`outputs/${name}`], 0, stream), 0, step);
            const given = takeAt(outputs[name], 0, lane);
            note(`outputs/${name}`, stack(Array.from(arrays.positions.data, (at) => takeAt(given, 0, Number(at)))), wanted);
          }
          if (state !== null && stream < kept) {
            for (const { name, batch_axis: axis } of this.spec.states) {
              note(`after/${name}`, takeAt(state[name], axis, lane), takeAt(takeAt(arrays[`after/${name}`], 0, stream), 0, index));
            }
          }
        }
        progress?.(first * steps + step + 1, streams * steps);
      }
    }
    this.reset();
    const [tensor, error] = Object.entries(errors).reduce((worst, item) => (item[1] <= worst[1] ? worst : item), ["none", -1]);
    const passed = exact === 0 && error >= 0 && error <= FREE_RUN_BUDGET;
    return { passed, streams, steps, budget: FREE_RUN_BUDGET, worst: { tensor, error }, errors, exact };
  }

  async close() {
    await this.runtime.close();
  }

  /** @param {number} lane */
  _lane(lane) {
    if (!Number.isInteger(lane) || lane < 0 || lane >= this.batch) {
      throw new InputError(`The session has lanes 0 .. ${this.batch - 1}; given ${lane}.`);
    }
    return lane;
  }

  /** Returns the whole state with one lane replaced. @param {number} lane @param {(state: any) => NdArray} part */
  _replaced(lane, part) {
    this._lane(lane);
    const whole = this.readState();
    for (const state of this.spec.states) putAt(whole[state.name], state.batch_axis, lane, part(state));
    return whole;
  }

  /** Replaces the whole state and, if tokens are counted, the lanes' token counts. @param {Arrays} arrays @param {number[] | null} used */
  _put(arrays, used) {
    this.runtime.loadState(wrapped(this.spec.states, arrays));
    const offsets = arrays[OFFSET];
    /** @type {number[]} */
    this.offsets = offsets ? Array.from(offsets.data, Number) : Array(this.batch).fill(0);
    if (this._tokens && used) this._tokens.used = used;
  }

  /** The token counts of a lane, or of all lanes, for a snapshot. @param {number} [lane] */
  _had(lane) {
    if (!this._tokens) return null;
    return lane === undefined ? this._tokens.used : [this._tokens.used[this._lane(lane)]];
  }

  /** @param {string} name @param {Tokens} tokens @param {number[]} [valid] @returns {[Arrays, number[]]} */
  _checked(name, tokens, valid) {
    const entry = this.runtime.entry(name);
    const [spec] = entry.inputs;
    const given = this._array(spec, tokens);
    if (String(given.shape) !== String(spec.shape)) throw new InputError(`${spec.name} has the shape [${spec.shape}]; given [${given.shape}].`);
    const [length, counted] = [spec.shape[1], entry.inputs.some((/** @type {any} */ input) => input.name === VALID)];
    const counts = valid ?? Array(this.batch).fill(length);
    const fit = counts.length === this.batch && counts.every((count) => Number.isInteger(count) && count >= 0 && count <= length);
    if (!fit || (!counted && counts.some((count) => count !== length))) {
      throw new InputError(`The entry ${name} cannot take [${counts}] tokens on its ${this.batch} lanes. Use feed.`);
    }
    this._checkTokens(spec, given, counts);
    /** @type {Arrays} */
    const inputs = record();
    inputs[spec.name] = given;
    if (counted) inputs[VALID] = { data: BigInt64Array.from(counts, BigInt), shape: [this.batch], dtype: "int64" };
    return [inputs, counts];
  }

  /** Throws on valid tokens that are not finite. @param {any} spec @param {NdArray} given @param {number[]} counts */
  _checkTokens(spec, given, counts) {
    if (!isFloat(given.dtype)) return;
    const [length, width] = [given.shape[1], sizeOf(given.shape.slice(2))];
    const numbers = /** @type {Float32Array} */ (given.data);
    const bad = counts.flatMap((count, lane) => {
      const start = lane * length * width;
      return numbers.subarray(start, start + count * width).every(Number.isFinite) ? [] : [lane];
    });
    if (bad.length) throw new InputError(`${spec.name} holds NaN or infinite numbers on lanes [${bad}].`);
  }

  /** Converts tokens to an array of the input's dtype, and checks the range. @param {any} spec @param {Tokens} tokens @returns {NdArray} */
  _array(spec, tokens) {
    let array = /** @type {NdArray} */ (tokens);
    if (Array.isArray(tokens)) {
      const shape = [];
      for (let part = /** @type {any} */ (tokens); Array.isArray(part) || ArrayBuffer.isView(part); part = /** @type {any} */ (part)[0]) shape.push(/** @type {any} */ (part).length);
      const flat = tokens.flat(Infinity).flatMap((value) => (ArrayBuffer.isView(value) ? Array.from(/** @type {any} */ (value)) : [value]));
      const Type = typeOf(spec.dtype);
      if (flat.length !== sizeOf(shape)) throw new InputError(`${spec.name} is not an array: its rows have different lengths.`);
      if (spec.dtype === "int64" && !flat.every((value) => Number.isInteger(Number(value)))) throw new InputError(`${spec.name} takes whole numbers.`);
      const data = spec.dtype === "int64" ? BigInt64Array.from(flat, BigInt) : /** @type {any} */ (Type).from(flat, Number);
      array = { data, shape, dtype: spec.dtype };
    }
    if (array.dtype !== spec.dtype) throw new InputError(`${spec.name} has the dtype ${spec.dtype}; given ${array.dtype}.`);
    if (spec.minimum !== null) {
      for (const value of array.data) {
        if (value < spec.minimum || value > spec.maximum) throw new InputError(`${spec.name} must lie in ${spec.minimum} .. ${spec.maximum}; given ${value}.`);
      }
    }
    return array;
  }

  /** The number of tokens of each lane in the next call of step. @param {any} entry @param {number[]} left */
  _stepped(entry, left) {
    const [length, chunk] = [entry.inputs[0].shape[1], this.spec.chunk_size];
    const ready = left.map((count, lane) => (this.offsets[lane] === 0 ? Math.min(count, length) : 0));
    if (!entry.inputs.some((/** @type {any} */ input) => input.name === VALID)) {
      return ready.every((count) => count === length) ? ready : ready.map(() => 0);
    }
    const worth = (/** @type {number} */ count) => !this.runtime.has("decode") || count * DECODES_PER_STEP >= chunk;
    return ready.map((count) => (worth(count) ? count : 0));
  }

  /** @param {"step" | "decode"} name @param {NdArray} given @param {number[]} done @param {number[]} counts @param {Arrays} results */
  async _part(name, given, done, counts, results) {
    const [spec] = this.runtime.entry(name).inputs;
    const batch = zeros(spec.shape, spec.dtype);
    const width = sizeOf(spec.shape.slice(2));
    const [total, length] = [given.shape[1], spec.shape[1]];
    counts.forEach((count, lane) => {
      const start = (lane * total + done[lane]) * width;
      // @ts-ignore: both are of one type
      batch.data.set(given.data.subarray(start, start + count * width), lane * length * width);
    });
    const outputs = await this[name](batch, counts.every((count) => count === length) ? undefined : counts);
    for (const [key, value] of Object.entries(outputs)) {
      if (results[key] === undefined) continue;
      const size = sizeOf(value.shape.slice(2));
      counts.forEach((count, lane) => {
        // @ts-ignore: both are of one type
        results[key].data.set(value.data.subarray(lane * length * size, (lane * length + count) * size), (lane * total + done[lane]) * size);
      });
    }
    counts.forEach((count, lane) => (done[lane] += count));
  }

  async _commitFull() {
    if (!this.offsets.includes(this.spec.chunk_size) || !this._chunked) return;
    await this.runtime.call("commit", record());
    this.offsets = this.offsets.map((offset) => (offset === this.spec.chunk_size ? 0 : offset));
  }

  /** @param {Arrays} outputs @param {number[]} counts */
  _checkFinite(outputs, counts) {
    if (this.runtime.finite(outputs)) return;
    const lanes = counts.map((_, lane) => lane).filter((lane) => counts[lane] > 0);
    const bad = (/** @type {NdArray} */ part) => isFloat(part.dtype) && !Array.from(/** @type {Float32Array} */ (part.data)).every(Number.isFinite);
    const raise = (/** @type {string} */ what, /** @type {(lane: number) => NdArray} */ part) => {
      const found = lanes.filter((lane) => bad(part(lane)));
      if (found.length) throw new NonFiniteError(`The ${what} holds NaN or infinite numbers on lanes [${found}]. Reset them to go on.`);
    };
    for (const [name, value] of Object.entries(outputs)) {
      raise(`output ${name}`, (lane) => stack(Array.from({ length: counts[lane] }, (_, t) => takeAt(takeAt(value, 0, lane), 0, t))));
    }
    const whole = this.readState();
    for (const state of this.spec.states) raise(`state ${state.name}`, (lane) => takeAt(whole[state.name], state.batch_axis, lane));
  }
}

/** Stack arrays of equal shape on a new first axis. @param {NdArray[]} parts @returns {NdArray} */
export function stack(parts) {
  const whole = zeros([parts.length, ...parts[0].shape], parts[0].dtype);
  parts.forEach((part, index) => putAt(whole, 0, index, part));
  return whole;
}

/** Wrap counters as their graph does: subtract the period from values of base + period and more. @param {any[]} states @param {Arrays} arrays */
function wrapped(states, arrays) {
  /** @type {Arrays} */
  const found = record();
  for (const { name, wrap } of states) {
    const array = (found[name] = arrays[name]);
    if (!wrap.length) continue;
    const [base, period] = array.dtype === "int64" ? wrap.map(BigInt) : wrap;
    // @ts-ignore: numbers and BigInts alike
    found[name] = { ...array, data: array.data.map((value) => (value >= base + period ? base + ((value - base) % period) : value)) };
  }
  return found;
}

/** The snapshot header, in the format of Python's json.dumps. @param {string} fingerprint @param {number | null} lanes @param {number[] | null} tokens */
function header(fingerprint, lanes, tokens) {
  const had = tokens === null ? "" : `, "tokens": [${tokens.join(", ")}]`;
  return `{"fingerprint": ${JSON.stringify(fingerprint)}, "lanes": ${JSON.stringify(lanes)}${had}}`;
}

/** @param {string} text */
function fromHex(text) {
  return Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

/** Root mean square norm of the rows. @param {NdArray} array [N, T, ...] */
function rms(array) {
  const numbers = /** @type {Float32Array} */ (array.data);
  let sum = 0;
  for (const value of numbers) sum += value * value;
  const rows = Math.max(array.shape[0] * array.shape[1], 1);
  return Math.sqrt(sum / rows);
}

/** ||given - wanted|| / max(||wanted||, usual). @param {NdArray} given @param {NdArray} wanted @param {number} usual */
function relativeError(given, wanted, usual) {
  let [difference, norm] = [0, 0];
  for (let i = 0; i < wanted.data.length; i++) {
    const [a, b] = [Number(given.data[i]), Number(wanted.data[i])];
    difference += (a - b) ** 2;
    norm += b * b;
  }
  const scale = Math.max(Math.sqrt(norm), usual);
  return difference === 0 ? 0 : Math.sqrt(difference) / scale;
}
