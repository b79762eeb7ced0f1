// Runs the graphs of a bundle on ONNX Runtime Web, and keeps the state between calls.

import { copyOf, isFinite_, putAt as put, record, takeAt } from "./arrays.js";
import { InputError, RunError } from "./errors.js";

/** @typedef {import("./arrays.js").NdArray} NdArray */
/** @typedef {import("./arrays.js").Arrays} Arrays */

const COUNT = "lane.count";

export class Runtime {
  /** @param {any} ort onnxruntime-web @param {import("./bundle.js").Bundle} bundle */
  constructor(ort, bundle) {
    this.spec = bundle.spec;
    this._ort = ort;
    this._bundle = bundle;
    /** @type {Map<string, Promise<any>>} */
    this._sessions = new Map();
    /** @type {Arrays} */
    this._state = record();
  }

  /** @param {string} name */
  entry(name) {
    const found = this.spec.entries.find((/** @type {any} */ entry) => entry.name === name);
    if (found === undefined) {
      const known = this.spec.entries.map((/** @type {any} */ entry) => entry.name).join(", ");
      throw new InputError(`There is no entry ${JSON.stringify(name)}. Entries: ${known}.`);
    }
    return found;
  }

  /** @param {string} name */
  has(name) {
    return this.spec.entries.some((/** @type {any} */ entry) => entry.name === name);
  }

  /** @param {Arrays} arrays */
  loadState(arrays) {
    for (const { name } of this.spec.states) this._state[name] = copyOf(arrays[name]);
  }

  /** @returns {Arrays} */
  readState() {
    const found = record();
    for (const { name } of this.spec.states) found[name] = copyOf(this._state[name]);
    return found;
  }

  /** Runs an entry, advances the state, and returns the outputs by name. @param {string} name @param {Arrays} inputs @returns {Promise<Arrays>} */
  async call(name, inputs) {
    const entry = this.entry(name);
    const session = await this._session(name);
    const states = this.spec.states;
    /** @type {Record<string, any>} */
    const feeds = record();
    for (const { name: input } of entry.inputs) feeds[input] = this._tensor(inputs[input]);
    for (const state of states) if (entry.reads.includes(state.name)) feeds[state.past] = this._tensor(this._state[state.name]);
    let results;
    try {
      results = await session.run(feeds);
    } catch (error) {
      throw new RunError(`ONNX Runtime failed while it ran ${name}: ${error}`, { cause: error });
    }
    const before = this._state[COUNT] && copyOf(this._state[COUNT]);
    for (const state of states) {
      if (!entry.writes.includes(state.name)) continue;
      const given = results[state.present];
      if (state.append_axis === null) this._state[state.name] = { data: given.data, shape: [...state.shape], dtype: state.dtype };
      else this._append(state, { data: given.data, shape: [...given.dims], dtype: state.dtype }, before, inputs.valid);
    }
    const outputs = record();
    for (const item of entry.outputs) outputs[item.name] = { data: results[item.name].data, shape: [...item.shape], dtype: item.dtype };
    return outputs;
  }

  /** Whether all numbers in the state and in these outputs are finite. @param {Arrays} outputs */
  finite(outputs) {
    return [...Object.values(this._state), ...Object.values(outputs)].every(isFinite_);
  }

  async close() {
    for (const session of this._sessions.values()) await (await session).release();
    this._sessions.clear();
  }

  /** Opens a graph at its first use. @param {string} name */
  _session(name) {
    let found = this._sessions.get(name);
    if (found === undefined) {
      found = this._open(name);
      this._sessions.set(name, found);
    }
    return found;
  }

  /** @param {string} name */
  async _open(name) {
    const graph = await this._bundle.file(`graphs/${name}.onnx`);
    const weights = "graphs/weights.bin";
    const externalData = this._bundle.has(weights) ? [{ path: "weights.bin", data: await this._bundle.file(weights) }] : [];
    try {
      return await this._ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData });
    } catch (error) {
      throw new RunError(`ONNX Runtime cannot open ${name}.onnx: ${error}`, { cause: error });
    }
  }

  /** @param {NdArray} array */
  _tensor(array) {
    return new this._ort.Tensor(array.dtype, array.data, array.shape);
  }

  /**
   * Writes new rows into a ring: row t of a call at (tokens before the call + t) modulo its size.
   * @param {any} state @param {NdArray} rows @param {NdArray} count @param {NdArray | undefined} valid
   */
  _append(state, rows, count, valid) {
    const { batch_axis: lanes, append_axis: axis } = state;
    const ring = copyOf(this._state[state.name]);
    const [size, length] = [state.shape[axis], rows.shape[axis]];
    const inner = axis > lanes ? axis - 1 : axis;
    for (let lane = 0; lane < state.shape[lanes]; lane++) {
      const own = takeAt(ring, lanes, lane);
      const given = takeAt(rows, lanes, lane);
      const used = valid === undefined ? length : Number(valid.data[lane]);
      for (let t = 0; t < used; t++) {
        const place = Number((BigInt(count.data[lane]) + BigInt(t)) % BigInt(size));
        put(own, inner, place, takeAt(given, inner, t));
      }
      put(ring, lanes, lane, own);
    }
    this._state[state.name] = ring;
  }

}

