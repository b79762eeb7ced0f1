// Tokens of each lane since its reset, compared with the capacity; see runtimes/session/lane_tokens.py.

import { InputError, SnapshotError, StreamError } from "./errors.js";
import { takeAt } from "./arrays.js";

/** @typedef {import("./arrays.js").Arrays} Arrays */

export class LaneTokens {
  /** @param {any} spec @param {number} capacity in tokens @param {Arrays} initial the states' initial values */
  constructor(spec, capacity, initial) {
    this.capacity = capacity;
    this.used = Array(spec.batch).fill(0);
    this._counters = spec.states.filter((/** @type {any} */ state) => state.per_token !== null);
    this._initial = initial;
  }

  /** Throws StreamError if a lane would exceed the capacity. @param {number[]} counts tokens of a call on each lane */
  check(counts) {
    const full = counts.map((count, lane) => (count > 0 && this.used[lane] + count > this.capacity ? lane : -1)).filter((lane) => lane >= 0);
    if (!full.length) return;
    throw new StreamError(
      `A lane takes at most ${this.capacity} tokens between two resets (the model's capacity, or the artifact's ` +
        `limit). Lanes [${full}] have had [${full.map((lane) => this.used[lane])}] and are given ` +
        `[${full.map((lane) => counts[lane])}] more. Restart them with ${full.map((lane) => `reset(${lane})`).join(", ")}, ` +
        "or give them fewer tokens. The state is unchanged.",
    );
  }

  /** @param {number[]} counts */
  add(counts) {
    this.used = this.used.map((used, lane) => used + counts[lane]);
  }

  /** Sets the token counts of the lanes: as given, or as counted by the states. @param {number[] | undefined} tokens @param {Arrays} arrays */
  given(tokens, arrays) {
    if (tokens === undefined && this._counters.length) return this._counted(arrays);
    if (tokens?.length !== this.used.length || !tokens.every((count) => Number.isSafeInteger(count) && count >= 0)) {
      throw new InputError(
        `The model takes at most ${this.capacity} tokens per lane. Pass the number of tokens of each of the ${this.used.length} lanes: ` +
          `loadState(arrays, [...]); given ${JSON.stringify(tokens)}.`,
      );
    }
    return [...tokens];
  }

  /**
   * Sets the token counts after a snapshot was restored into one lane, or into all.
   * @param {unknown} held the counts in the snapshot @param {Arrays} arrays the whole states after the restore @param {number} [lane]
   */
  restored(held, arrays, lane) {
    let found = held;
    if (held === undefined) {
      if (!this._counters.length) throw new SnapshotError("The snapshot does not say how many tokens its lanes have had, and the model takes a limited number.");
      const counted = this._counted(arrays);
      found = lane === undefined ? counted : [counted[lane]];
    }
    const wanted = lane === undefined ? this.used.length : 1;
    if (!Array.isArray(found) || found.length !== wanted || !found.every((count) => Number.isSafeInteger(count) && count >= 0)) {
      throw new SnapshotError(`The snapshot has the token counts ${JSON.stringify(held)}; expected a count for each lane.`);
    }
    return this.used.map((used, index) => (lane === undefined ? found[index] : index === lane ? found[0] : used));
  }

  /** The largest token count that any state has for each lane. @param {Arrays} arrays */
  _counted(arrays) {
    return this.used.map((_, lane) =>
      Math.max(
        0,
        ...this._counters.flatMap(({ name, batch_axis: axis, per_token: growth }) => {
          const [now, first] = [arrays[name], this._initial[name]].map((array) => Array.from(takeAt(array, axis, lane).data, Number));
          return now.map((value, index) => Math.ceil((value - first[index]) / growth));
        }),
      ),
    );
  }
}
