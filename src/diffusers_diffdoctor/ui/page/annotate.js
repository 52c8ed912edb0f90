// Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
// Painting masks. The mask is an array of a byte for each pixel of the image, never a picture of a canvas: what is drawn on the screen is
// made from it, and what is saved is it.
"use strict";

const ARTIFACT = 255, UNSURE = 128;
const COLORS = { 255: [214, 51, 132], 128: [240, 173, 40] };
const SUGGESTED = [0, 150, 190];
const LONGEST_HISTORY = 100, HISTORY_BYTES = 2 ** 28;
const RETRY = 2000; // milliseconds

const $ = (id) => document.getElementById(id);
const api = (path, options) => fetch("api/" + path, options);

// A page keeps its name when it is reloaded. A copied tab has the same name; the server gives the image to whoever asked last.
const page = sessionStorage.page ??= crypto.getRandomValues(new Uint32Array(4)).join("-");

let settings = null;
let item = null; // what the server has lent
let mask = null, suggestion = null, outline = null;
let picture = null, layer = null, layerPixels = null; // the image, and its mask in colours
let tool = ARTIFACT, hidden = false;
let scale = 1, left = 0, top_ = 0; // of the image in the view
let undoable = [], redoable = [], visited = [];
let stroke = null, moving = null, spaceDown = false, pointer = null;
let began = 0;
let saving = Promise.resolve(), unsaved = 0, newest = 0;

// --- talking to the server ---------------------------------------------------------------------------------------------------

class Refused extends Error {}

async function answer(response) {
  if (response.ok) return response;
  let said = response.statusText;
  try { said = (await response.json()).error ?? said; } catch { /* no JSON */ }
  throw response.status === 409 ? new Refused(said) : Object.assign(new Error(said), { status: response.status });
}

async function post(path, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return (await answer(await api(path, options))).json();
}

async function bytes(path) {
  return new Uint8Array(await (await answer(await api(path))).arrayBuffer());
}

async function deflated(array) {
  const stream = new Blob([array]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Response(stream).blob();
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function block(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

// Saves go one after the other; of drafts that wait only the newest is sent. A server that does not answer is asked again.
function save(state) {
  const mine = ++newest, what = item, copy = mask.slice(), kinds = chosenKinds().join(","), seconds = spent();
  unsaved++;
  say("saving");
  const work = saving.then(async () => {
    if (state === "draft" && mine < newest) return;
    const query = new URLSearchParams({ loan: what.loan, state, kinds, seconds });
    const body = await deflated(copy);
    for (;;) {
      try {
        const headers = { "Content-Type": "application/octet-stream" };
        const response = await answer(await api(`save/${what.key}?${query}`, { method: "POST", headers, body }));
        what.revision = (await response.json()).revision;
        return;
      } catch (error) {
        if (error instanceof Refused || error.status === 400) throw error;
        say(error.status ? error.message : "no answer, trying again", true);
        await pause(RETRY);
      }
    }
  }).finally(() => unsaved--);
  saving = work.catch(() => {});
  return work.then(() => { if (!unsaved) say("saved"); }, (error) => { lost(error); throw error; });
}

function lost(error) {
  say("not saved", true);
  item = null;
  block(`${error.message}\nReload the page to go on.`);
}

async function claim(key = null) {
  const annotator = localStorage.annotator;
  block("");
  try {
    await saving;
    const { item: lent, progress } = await post("claim", { annotator, page, key });
    showProgress(progress);
    item = null;
    if (!lent) return block("Nothing is left for you. Thank you!");
    const source = new Image();
    source.src = `api/image/${lent.key}`;
    const who = encodeURIComponent(annotator);
    [mask, suggestion] = await Promise.all([
      bytes(`mask/${lent.key}?annotator=${who}`), bytes(`suggestion/${lent.key}`), source.decode(),
    ]).then(([first, second]) => [first, second]);
    show(lent, source);
  } catch (error) {
    block(`${error.message}\nReload the page to go on.`);
  }
}

function show(lent, source) {
  item = lent;
  picture = source;
  layer = new OffscreenCanvas(item.width, item.height);
  layerPixels = new ImageData(item.width, item.height);
  undoable = [];
  redoable = [];
  began = performance.now();
  $("about").textContent = [item.prompt, item.category.join(", "), item.name, `${item.width} x ${item.height}`].filter(Boolean).join(" · ");
  $("about").title = $("about").textContent;
  for (const box of $("kinds").querySelectorAll("input")) box.checked = item.kinds.includes(box.value);
  $("suggestion").disabled = !suggestion.length;
  say(item.state === "done" ? "finished, and stays so" : item.state ? `continued (${item.state})` : "");
  fit();
  trace();
  recolor();
  document.body.dataset.item = item.key;
}

function showProgress(progress) {
  const total = progress.images * progress.copies, left = progress.missing;
  $("bar").style.width = `${(100 * (total - left)) / total}%`;
  const mine = progress.annotators[localStorage.annotator.toLowerCase()];
  $("progress").textContent = `${total - left} of ${total} masks, ${mine ? mine.done : 0} yours`;
}

const spent = () => Math.round((item.seconds + (performance.now() - began) / 1000) * 10) / 10;
const chosenKinds = () => [...$("kinds").querySelectorAll("input:checked")].map((box) => box.value);

async function finish(state) {
  if (!item) return;
  const key = item.key;
  try {
    const saved = save(state);
    item = null; // no stroke goes into a mask that is finished
    await saved;
  } catch { return; }
  visited.push(key);
  await claim();
}

// --- the mask -----------------------------------------------------------------------------------------------------------------

// A pixel is painted if its centre lies within half the brush of the centre of the pixel under the pointer's way.
function dab(x, y) {
  const radius = Number($("size").value) / 2, reach = Math.floor(radius);
  for (let row = Math.max(0, y - reach); row <= Math.min(item.height - 1, y + reach); row++) {
    for (let column = Math.max(0, x - reach); column <= Math.min(item.width - 1, x + reach); column++) {
      if ((column - x) ** 2 + (row - y) ** 2 <= radius * radius) mask[row * item.width + column] = tool;
    }
  }
}

// Returns the rows that it may have changed, as recolor takes them.
function line(from, to) {
  const steps = Math.max(Math.abs(to.x - from.x), Math.abs(to.y - from.y), 1);
  for (let step = 0; step <= steps; step++) {
    dab(Math.round(from.x + ((to.x - from.x) * step) / steps), Math.round(from.y + ((to.y - from.y) * step) / steps));
  }
  const reach = Math.ceil(Number($("size").value) / 2);
  const rows = [Math.min(from.y, to.y) - reach, Math.max(from.y, to.y) + reach + 1];
  return rows.map((row) => Math.min(item.height, Math.max(0, row)));
}

function remember() {
  undoable.push(mask.slice());
  if (undoable.length > Math.max(10, Math.min(LONGEST_HISTORY, HISTORY_BYTES / mask.length))) undoable.shift();
  redoable = [];
}

function changed() {
  recolor();
  return save("draft").catch(() => {});
}

function step(from, to) {
  if (!item || !from.length) return;
  to.push(mask);
  mask = from.pop();
  changed();
}

// Undone like a stroke.
function replace(make) {
  if (!item) return;
  remember();
  mask = make();
  changed();
}

const leastConfidence = () => Math.max(1, Math.round((255 * Number($("threshold").value)) / 100));
const suggested = () => {
  const least = leastConfidence();
  return suggestion.map((confidence) => (confidence >= least ? ARTIFACT : 0));
};

// --- the screen ---------------------------------------------------------------------------------------------------------------

// Where the suggestion ends, as an array like the mask.
function trace() {
  outline = new Uint8Array(mask.length);
  if (!suggestion.length) return;
  const { width, height } = item, least = leastConfidence();
  const inside = (i) => suggestion[i] >= least;
  for (let i = 0; i < mask.length; i++) {
    if (!inside(i)) continue;
    const x = i % width;
    const border = i < width || i >= width * (height - 1) || x === 0 || x === width - 1;
    outline[i] = border || !inside(i - 1) || !inside(i + 1) || !inside(i - width) || !inside(i + width) ? 1 : 0;
  }
}

// Bring rows [first, end) of the layer of colours up to date, and show it.
function recolor(first = 0, end = item.height) {
  const colors = layerPixels.data;
  for (let i = first * item.width; i < end * item.width; i++) {
    const color = outline[i] ? SUGGESTED : COLORS[mask[i]];
    if (color) [colors[4 * i], colors[4 * i + 1], colors[4 * i + 2]] = color;
    colors[4 * i + 3] = color ? 255 : 0;
  }
  layer.getContext("2d").putImageData(layerPixels, 0, 0, 0, first, item.width, end - first);
  $("undo").disabled = !undoable.length;
  $("redo").disabled = !redoable.length;
  draw();
}

function draw() {
  const canvas = $("canvas"), ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = $("view");
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  $("zoom-shown").textContent = `${Math.round(100 * scale)} %`;
  $("size-shown").textContent = $("size").value;
  $("threshold-shown").textContent = (Number($("threshold").value) / 100).toFixed(2);
  for (const button of document.querySelectorAll("[data-tool]")) button.classList.toggle("on", Number(button.dataset.tool) === tool);
  if (!item) return;
  context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * left, ratio * top_);
  context.imageSmoothingEnabled = scale < 1;
  context.drawImage(picture, 0, 0);
  if (!hidden) {
    context.globalAlpha = Number($("opacity").value) / 100;
    context.drawImage(layer, 0, 0);
    context.globalAlpha = 1;
  }
  if (pointer && !moving) {
    context.beginPath();
    context.arc(pointer.x + 0.5, pointer.y + 0.5, Math.max(0.5, Number($("size").value) / 2), 0, 2 * Math.PI);
    for (const [color, width] of [["#000", 2.5], ["#fff", 1]]) {
      context.strokeStyle = color;
      context.lineWidth = width / scale;
      context.stroke();
    }
  }
}

function fit() {
  const { clientWidth: width, clientHeight: height } = $("view");
  scale = Math.min(width / item.width, height / item.height) * 0.96;
  left = (width - item.width * scale) / 2;
  top_ = (height - item.height * scale) / 2;
  draw();
}

function zoom(factor, x = $("view").clientWidth / 2, y = $("view").clientHeight / 2) {
  const next = Math.min(64, Math.max(0.02, scale * factor));
  left = x - ((x - left) * next) / scale;
  top_ = y - ((y - top_) * next) / scale;
  scale = next;
  draw();
}

function place(event) {
  const box = $("view").getBoundingClientRect();
  return { x: Math.floor((event.clientX - box.left - left) / scale), y: Math.floor((event.clientY - box.top - top_) / scale) };
}

// --- events -------------------------------------------------------------------------------------------------------------------

const view = $("view");
view.addEventListener("pointerdown", (event) => {
  if (!item) return;
  view.focus({ preventScroll: true });
  view.setPointerCapture(event.pointerId);
  event.preventDefault();
  if (event.button === 1 || spaceDown) {
    moving = { x: event.clientX - left, y: event.clientY - top_ };
  } else if (event.button === 0) {
    remember();
    stroke = place(event);
    recolor(...line(stroke, stroke));
  }
});
view.addEventListener("pointermove", (event) => {
  if (!item) return;
  if (moving) {
    left = event.clientX - moving.x;
    top_ = event.clientY - moving.y;
  }
  pointer = place(event);
  if (stroke) {
    const from = stroke;
    stroke = pointer;
    recolor(...line(from, pointer));
  } else draw();
});
const lift = () => {
  moving = null;
  if (!stroke) return;
  stroke = null;
  if (item) changed();
};
view.addEventListener("pointerup", lift);
view.addEventListener("pointercancel", lift);
view.addEventListener("pointerleave", () => { pointer = null; draw(); });
view.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = view.getBoundingClientRect();
  if (item) zoom(1.0015 ** -event.deltaY, event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

function grow(by) {
  const size = $("size");
  size.value = Math.max(1, Number(size.value) + by * Math.max(1, Math.round(Number(size.value) / 8)));
  draw();
}

const actions = {
  b: () => choose(ARTIFACT), e: () => choose(0), u: () => choose(UNSURE),
  z: () => step(undoable, redoable), y: () => step(redoable, undoable),
  c: () => replace(() => new Uint8Array(mask.length)),
  a: () => suggestion.length && replace(suggested),
  h: () => { hidden = !hidden; draw(); },
  n: () => {
    if (!item) return;
    mask = new Uint8Array(mask.length);
    for (const box of $("kinds").querySelectorAll("input")) box.checked = false;
    finish("done");
  },
  s: () => finish("skipped"),
  enter: () => finish("done"),
  p: () => { if (visited.length) claim(visited.pop()); },
  "[": () => grow(-1), "]": () => grow(1),
  "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: () => item && fit(),
};
function choose(value) { tool = value; draw(); }

addEventListener("keydown", (event) => {
  if (event.target.matches("input:not([type=range]):not([type=checkbox])") || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === " ") { spaceDown = true; event.preventDefault(); return; }
  if ((event.ctrlKey || event.metaKey) && key !== "z" && key !== "y") return;
  if (event.target.matches("button") && key === "enter") return; // the button's own
  const name = key === "z" && event.shiftKey ? "y" : key;
  if (!(name in actions) || stroke || event.repeat && !"[]+-=zy".includes(name)) return;
  event.preventDefault();
  actions[name]();
});
addEventListener("keyup", (event) => { if (event.key === " ") spaceDown = false; });
addEventListener("blur", () => { spaceDown = false; });
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
new ResizeObserver(() => (item ? fit() : draw())).observe(view);

for (const [id, key] of Object.entries({ undo: "z", redo: "y", clear: "c", take: "a", done: "enter", clean: "n", skip: "s", back: "p",
  in: "+", out: "-", fit: "0" })) $(id).addEventListener("click", () => { actions[key](); view.focus(); });
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => { choose(Number(button.dataset.tool)); view.focus(); });
}
$("size").addEventListener("input", draw);
$("opacity").addEventListener("input", draw);
$("threshold").addEventListener("input", () => {
  if (!item) return;
  trace();
  recolor();
});
$("kinds").addEventListener("change", () => { if (item) changed(); });
$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  localStorage.annotator = $("annotator").value;
  visited = [];
  claim();
  view.focus();
});

// The page says that it is still there, so that its image is not lent to another.
async function stay() {
  for (;;) {
    await pause((settings.loan_seconds * 1000) / 3);
    const held = item;
    if (!held) continue;
    try { await post(`renew/${held.key}`, { loan: held.loan }); } catch (error) {
      if (error instanceof Refused && item === held) lost(error);
    }
  }
}

async function start() {
  draw();
  $("annotator").value ||= localStorage.annotator ?? ""; // a fast typist comes before the script
  settings = await (await answer(await api("settings"))).json();
  for (const kind of settings.kinds) {
    const label = document.createElement("label"), box = document.createElement("input");
    [box.type, box.value] = ["checkbox", kind];
    label.append(box, ` ${kind}`);
    $("kinds").append(label);
  }
  $("who").querySelector("button").disabled = false;
  if (localStorage.annotator) claim();
  else block("Say your name to begin.");
  stay();
}
start().catch((error) => block(error.message));
