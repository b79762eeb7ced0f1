// The demo page: runs the model on drawings or text, token by token, and shows how its state changes.

import { sizeOf, takeAt } from "./arrays.js";
import { fromUrl, open } from "./nsm.js";
import { StateView } from "./state_view.js";

const $ = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));
const ASK = 17; // the token that asks the digits example for its prediction
const pause = (/** @type {number} */ ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Shows an error at the top of the page. @param {any} error */
function fail(error) {
  $("what").textContent = String(error.message ?? error);
  $("what").className = "bad";
}

/** Runs the work of a button and disables the other buttons meanwhile, because they share one stream. @param {() => Promise<void>} work */
async function alone(work) {
  const buttons = /** @type {HTMLButtonElement[]} */ (Array.from(document.querySelectorAll("button:not(#stop)")));
  buttons.forEach((button) => (button.disabled = true));
  try {
    await work();
  } catch (error) {
    fail(error);
    throw error;
  } finally {
    buttons.forEach((button) => (button.disabled = false));
  }
}

/** @param {string} html */
function put(html) {
  $("input").innerHTML = html;
  $("input").hidden = false;
}

/** Logits of the first lane at a token (default: the last). @param {import("./arrays.js").NdArray} outputs @param {number} [at] */
function logits(outputs, at = outputs.shape[1] - 1) {
  return Array.from(/** @type {Float32Array} */ (takeAt(takeAt(outputs, 0, 0), 0, at).data));
}

/** @param {number[]} values @param {number} [temperature] */
function softmax(values, temperature = 1) {
  const top = Math.max(...values);
  const powers = values.map((value) => Math.exp((value - top) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}

/** Runs tokens on the first lane; the other lanes have none. @param {any} session @param {any[]} tokens */
function feed(session, tokens) {
  const rows = Array.from({ length: session.batch }, () => tokens);
  return session.feed(rows, rows.map((_, lane) => (lane === 0 ? tokens.length : 0)));
}

/** @param {any} session @param {StateView} view */
function digits(session, view) {
  put(`<h2>Draw a digit</h2><canvas id="pixels" width="240" height="240" aria-label="8 by 8 pixels to draw in"></canvas>
    <div class="row"><button class="main" id="read">Read it</button><button id="clear">Clear</button><button id="fresh">Reset the stream</button></div>
    <div class="quiet">The model reads the digit row by row. The first row lies eight chunks before the prediction, outside the
    model's windows, so the prediction comes from the bank. Digits follow each other without a reset.</div>
    <div class="bars" id="bars"></div>`);
  const grid = new Float32Array(64);
  const canvas = $("pixels");
  const draw = (row = -1) => {
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    context.fillStyle = style.getPropertyValue("--ground");
    context.fillRect(0, 0, 240, 240);
    grid.forEach((ink, i) => {
      context.globalAlpha = Math.min(ink, 16) / 16;
      context.fillStyle = style.getPropertyValue("--text");
      context.fillRect((i % 8) * 30, Math.floor(i / 8) * 30, 30, 30);
    });
    context.globalAlpha = 1;
    context.strokeStyle = style.getPropertyValue("--accent");
    context.lineWidth = 3;
    if (row >= 0) context.strokeRect(1.5, row * 30 + 1.5, 237, 27);
  };
  const ink = (/** @type {PointerEvent} */ event) => {
    if (!event.buttons) return;
    const box = canvas.getBoundingClientRect();
    const [x, y] = [((event.clientX - box.left) / box.width) * 8, ((event.clientY - box.top) / box.height) * 8];
    grid.forEach((_, i) => {
      const distance = Math.hypot(x - (i % 8) - 0.5, y - Math.floor(i / 8) - 0.5);
      grid[i] = Math.min(16, grid[i] + Math.max(0, 1.15 - distance) * 9);
    });
    draw();
  };
  canvas.addEventListener("pointerdown", ink);
  canvas.addEventListener("pointermove", ink);
  const show = (/** @type {number[]} */ chances) => {
    const best = chances.indexOf(Math.max(...chances));
    $("bars").innerHTML = chances.map((chance, digit) =>
      `<span${digit === best ? ' class="good"' : ""}>${digit}</span><span class="bar"><i style="width:${(chance * 100).toFixed(1)}%"></i></span><span>${(chance * 100).toFixed(1)} %</span>`).join("");
  };
  const read = async () => {
    for (let row = 0; row < 9; row++) {
      const tokens = row < 8 ? Array.from(grid.subarray(row * 8, row * 8 + 8), Math.round) : Array(8).fill(ASK);
      const { outputs } = await feed(session, tokens);
      draw(row);
      show(softmax(logits(outputs)));
      view.draw(session.readState());
      await pause(120);
    }
    draw();
  };
  const seven = [0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 16, 16, 16, 15, 0, 0, 0, 4, 6, 4, 9, 16, 0, 0, 0, 0, 0, 0, 13, 9, 0, 0, 0, 0, 3, 11, 16, 12, 0, 0, 0, 0, 5, 16, 9, 2, 0, 0, 0, 0, 10, 10, 0, 0, 0, 0, 0, 0, 14, 4, 0, 0, 0, 0];
  grid.set(seven);
  $("read").onclick = () => alone(read);
  $("clear").onclick = () => (grid.fill(0), draw());
  $("fresh").onclick = () => (session.reset(), view.draw(session.readState()), show(Array(10).fill(0)));
  show(Array(10).fill(0));
  draw();
}

/** @param {any} session @param {StateView} view */
function text(session, view) {
  put(`<h2>Continue a text</h2><textarea id="prompt" aria-label="The beginning of a text">ROMEO:</textarea>
    <div class="row"><label>temperature <input id="heat" type="number" value="0.7" min="0" max="2" step="0.1"></label>
    <label>seed <input id="seed" type="number" value="1" min="0"></label></div>
    <div class="row"><button class="main" id="write">Write</button><button id="stop" disabled>Stop</button><span id="speed" class="quiet"></span></div>
    <pre id="text"></pre>`);
  let running = false;
  const write = async () => {
    running = true;
    $("stop").disabled = false;
    session.reset();
    const decoder = new TextDecoder();
    let random = Number($("seed").value) >>> 0;
    const uniform = () => { // mulberry32
      random = (random + 0x6d2b79f5) | 0;
      let mixed = Math.imul(random ^ (random >>> 15), 1 | random);
      mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
    };
    const prompt = new TextEncoder().encode($("prompt").value || "\n");
    let written = decoder.decode(prompt, { stream: true });
    let { outputs } = await feed(session, Array.from(prompt));
    const started = performance.now();
    for (let count = 1; running && count <= 400; count++) {
      const heat = Number($("heat").value);
      const chances = softmax(logits(outputs), Math.max(heat, 1e-3));
      let next = chances.indexOf(Math.max(...chances));
      if (heat > 0) for (let left = uniform(), i = 0; i < chances.length; i++) if ((left -= chances[i]) <= 0) { next = i; break; }
      written += decoder.decode(Uint8Array.of(next), { stream: true });
      ({ outputs } = await feed(session, [next]));
      if (count % 4 === 0) {
        $("text").textContent = written;
        $("text").scrollTop = $("text").scrollHeight;
        $("speed").textContent = `${Math.round((count / (performance.now() - started)) * 1000)} tokens/s`;
        view.draw(session.readState());
        await pause(0);
      }
    }
    $("text").textContent = written;
    $("stop").disabled = true;
  };
  $("write").onclick = () => alone(write);
  $("stop").onclick = () => (running = false);
}

/** @param {any} session @param {StateView} view */
function replay(session, view) {
  put(`<h2>Replay a recorded stream</h2><div class="row"><button class="main" id="play">Play</button><span id="at" class="quiet"></span></div>`);
  const play = async () => {
    session.reset();
    const { arrays } = await session.bundle.arrays("golden.npz");
    const stream = takeAt(arrays["inputs/tokens"], 0, 0);
    for (let step = 0; step < stream.shape[0]; step++) {
      const piece = takeAt(stream, 0, step);
      const whole = Array.from({ length: session.batch }, () => piece);
      const data = new /** @type {any} */ (piece.data.constructor)(piece.data.length * whole.length);
      whole.forEach((part, lane) => data.set(part.data, lane * part.data.length));
      await session.step({ data, shape: [whole.length, ...piece.shape], dtype: piece.dtype });
      view.draw(session.readState());
      $("at").textContent = `step ${step + 1} of ${stream.shape[0]}`;
      await pause(30);
    }
  };
  $("play").onclick = () => alone(play);
}

/** @param {any} session @param {StateView} view */
async function check(session, view) {
  const started = performance.now();
  const found = await session.check((/** @type {number} */ done, /** @type {number} */ total) => ($("progress").textContent = `${done} of ${total} steps`));
  const { passed, streams, steps, budget, worst, exact } = found;
  const number = (/** @type {number} */ value) => value.toExponential(1);
  $("verdict").innerHTML = `<b class="${passed ? "good" : "bad"}">${passed ? "Yes" : "No"}.</b> ${streams} streams of ${steps} steps; largest
    error ${number(worst.error)} (${worst.tensor}), budget ${number(budget)}${exact ? `; ${exact} masks or counters differ` : ""}.`;
  $("progress").textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`;
  document.documentElement.dataset.checked = passed ? "passed" : "failed";
  document.documentElement.dataset.worst = String(worst.error);
  view.draw(session.readState());
}

async function start() {
  const ort = await import(/** @type {any} */ ("./ort/ort.wasm.min.mjs"));
  ort.env.wasm.numThreads = 1; // more threads need headers that a plain file server does not send
  const session = await open(fromUrl(new URL("..", import.meta.url)), ort);
  const { model, spec } = session.bundle.manifest;
  const [input] = spec.entries[0].inputs;
  const [output] = spec.entries[0].outputs;
  const state = spec.states.reduce((/** @type {number} */ sum, /** @type {any} */ item) => sum + sizeOf(item.shape) * 4, 0);
  $("what").textContent = `${model.class}, ${model.parameters.toLocaleString("en")} parameters, on ONNX Runtime Web; ${(state / 1000).toFixed(1)} kB of state, for a stream of any length`;
  const view = new StateView($("state"), $("legend"), $("stateTitle"), spec);
  view.draw(session.readState());
  const classes = output.shape[2];
  const kind = input.maximum === ASK && classes === 10 ? digits : input.maximum === 255 && classes === 256 ? text : replay;
  kind(session, view);
  $("check").disabled = false;
  $("check").onclick = () => alone(() => check(session, view));
  document.documentElement.dataset.ready = kind.name;
  document.documentElement.dataset.done = "yes";
}

start().catch((error) => {
  fail(error);
  document.documentElement.dataset.done = "failed";
  throw error;
});
