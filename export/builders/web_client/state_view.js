// Draws the state: a bank as a row per slot, with masked slots hatched; other states as one block each.

import { isFloat, takeAt } from "./arrays.js";

/** @typedef {import("./arrays.js").NdArray} NdArray */

export class StateView {
  /** @param {HTMLElement} place @param {HTMLElement} legend @param {HTMLElement} title @param {any} spec */
  constructor(place, legend, title, spec) {
    this._states = spec.states;
    const banks = spec.states.filter((/** @type {any} */ state) => state.name.endsWith(".bank") && state.shape.length === 4);
    this._banks = banks.length > 0;
    this._shown = banks.length ? banks : spec.states.filter((/** @type {any} */ state) => isFloat(state.dtype) && state.shape.length > 1);
    title.textContent = banks.length ? "Bank and mask" : "State";
    legend.innerHTML = banks.length
      ? `<span><i class="swatch" style="background:#c2603a"></i>below zero</span><span><i class="swatch" style="background:#2a7fa8"></i>above zero</span>
         <span><i class="swatch" style="background:repeating-linear-gradient(135deg, var(--quiet) 0 1px, transparent 1px 4px)"></i>masked</span>
         <span>a row is a slot: its address, a gap, its content; at the left, its change since the last picture</span>`
      : "values of the first lane's states";
    /** @type {Map<string, {canvas: HTMLCanvasElement, before: Float32Array | null}>} */
    this._views = new Map();
    for (const { name } of this._shown) {
      const label = document.createElement("div");
      label.className = "quiet name";
      label.textContent = name;
      const canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `numbers of the state ${name}`);
      place.append(label, canvas);
      this._views.set(name, { canvas, before: null });
    }
  }

  /** @param {Record<string, NdArray>} states */
  draw(states) {
    for (const { name, batch_axis: axis } of this._shown) {
      const view = this._views.get(name);
      if (view === undefined) continue;
      const mask = states[name.replace(/\.bank$/, ".mask")];
      const own = takeAt(states[name], axis, 0);
      const rows = this._banks ? slots(own) : fields(own);
      const active = this._banks && mask ? Array.from(takeAt(mask, 0, 0).data, Boolean) : rows.map(() => true);
      paint(view, rows, active, this._banks ? 2 : 1);
    }
  }
}

/** Convert a bank [G, S, f] to S rows of G * f numbers. @param {NdArray} bank */
function slots(bank) {
  const [parts, count, width] = bank.shape;
  const numbers = /** @type {Float32Array} */ (bank.data);
  return Array.from({ length: count }, (_, slot) => {
    const row = new Float32Array(parts * width);
    for (let part = 0; part < parts; part++) {
      const start = (part * count + slot) * width;
      row.set(numbers.subarray(start, start + width), part * width);
    }
    return row;
  });
}

/** Convert any other state to rows of up to 128 numbers. @param {NdArray} part */
function fields(part) {
  const numbers = /** @type {Float32Array} */ (part.data);
  const width = Math.min(128, part.shape.at(-1) ?? 1);
  const count = Math.min(48, Math.ceil(numbers.length / width));
  return Array.from({ length: count }, (_, row) => {
    const whole = new Float32Array(width);
    whole.set(numbers.subarray(row * width, (row + 1) * width));
    return whole;
  });
}

/** @param {{canvas: HTMLCanvasElement, before: Float32Array | null}} view @param {Float32Array[]} rows @param {boolean[]} active @param {number} halves */
function paint(view, rows, active, halves) {
  const [height, columns] = [rows.length > 48 ? 6 : rows.length > 24 ? 8 : 13, rows[0]?.length ?? 0];
  const width = Math.max(2, Math.floor(560 / columns));
  const [margin, gap] = [26, halves > 1 ? 8 : 0];
  const { canvas } = view;
  canvas.width = margin + columns * width + gap;
  canvas.height = rows.length * height;
  const context = canvas.getContext("2d");
  if (context === null) return;
  const flat = new Float32Array(rows.length * columns);
  rows.forEach((row, index) => flat.set(row, index * columns));
  const sorted = Array.from(flat, Math.abs).sort((a, b) => a - b);
  const scale = sorted[Math.floor(sorted.length * 0.98)] || 1;
  const style = getComputedStyle(document.documentElement);
  rows.forEach((row, slot) => {
    const y = slot * height;
    if (!active[slot]) {
      context.strokeStyle = style.getPropertyValue("--quiet");
      context.globalAlpha = 0.6;
      for (let x = margin; x < canvas.width; x += 7) {
        context.beginPath();
        context.moveTo(x, y + height - 1);
        context.lineTo(x + height - 2, y + 1);
        context.stroke();
      }
      context.globalAlpha = 1;
      return;
    }
    let moved = 0;
    row.forEach((value, column) => {
      if (view.before !== null) moved += Math.abs(value - view.before[slot * columns + column]);
      const strength = Math.min(1, Math.abs(value) / scale);
      context.fillStyle = value < 0 ? "#c2603a" : "#2a7fa8";
      context.globalAlpha = 0.06 + 0.94 * strength;
      const x = margin + column * width + (column >= columns / halves ? gap : 0);
      context.fillRect(x, y, width, height - 1);
    });
    context.globalAlpha = 1;
    const share = Math.min(1, moved / (columns * scale * 0.25));
    context.fillStyle = style.getPropertyValue("--line");
    context.fillRect(0, y, 18, height - 1);
    context.fillStyle = "#1a9c8e";
    context.fillRect(0, y, 18 * share, height - 1);
  });
  view.before = flat;
}
