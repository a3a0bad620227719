"use strict";
// The page: drawing, the answer, and the network's layers. network.js computes, form.js makes 28×28 of a drawing.

const element = (id) => document.getElementById(id);
const network = JSON.parse(element("network").textContent);
[...network.parts, { steps: network.output }].reduce(
  (offset, part) => attach(part.steps, network.weights, offset),
  ((network.weights = decode(network.weights, network.half)), 0),
);

const MARGIN = 14; // of SIZE, on each side of what is drawn on: no ink touches the edge
const AREA = SIZE - 2 * MARGIN;
const UNSURE_BELOW = network.unsureBelow || 0.5;
const DIGITS = network.classes.every((name) => /^\d$/.test(name));
const INVITATION = DIGITS ? "Draw a digit" : `Draw one of ${network.classes.length} classes`;

// --- the drawing ----------------------------------------------------------------------------------------------------

const paper = element("paper");
const hidden = Object.assign(document.createElement("canvas"), { width: SIZE, height: SIZE });
const hiddenContext = hidden.getContext("2d", { willReadFrequently: true });
let marks = []; // strokes {width, points}, and pictures {canvas, digit}; points are in units of the hidden canvas
let pen = null; // of the keyboard: {x, y, down}
let pointer = null; // the mouse, finger or pen that draws
let waiting = 0;

/** All marks in one colour on nothing; the canvas shows `size` of the SIZE units, from `start` on. */
function paint(context, start, size, colour) {
  const { width } = context.canvas;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, width, width);
  context.setTransform(width / size, 0, 0, width / size, (-start * width) / size, (-start * width) / size);
  context.lineCap = context.lineJoin = "round";
  for (const { points, canvas, ...mark } of marks) {
    if (canvas) {
      context.drawImage(canvas, 0, 0);
      continue;
    }
    context.lineWidth = mark.width;
    context.beginPath();
    context.moveTo(...points[0]);
    for (const point of points) context.lineTo(...point);
    context.stroke();
  }
  context.globalCompositeOperation = "source-in";
  context.fillStyle = colour;
  context.fillRect(0, 0, SIZE, SIZE);
  context.globalCompositeOperation = "source-over";
}

/** What has been drawn, SIZE × SIZE numbers 0–255. */
function drawing() {
  paint(hiddenContext, 0, SIZE, "#fff");
  const { data } = hiddenContext.getImageData(0, 0, SIZE, SIZE);
  return new Float64Array(SIZE * SIZE).map((_, i) => data[4 * i + 3]);
}

function place(event) {
  const box = paper.getBoundingClientRect();
  const inside = (part) => MARGIN + AREA * Math.min(Math.max(part, 0), 1);
  return [inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)];
}

function begin(point) {
  marks.push({ width: Number(element("stroke").value), points: [point] });
  update();
}

paper.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button !== 0) return;
  pointer = event.pointerId;
  pen = null;
  paper.setPointerCapture(pointer);
  begin(place(event));
});
paper.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const events = event.getCoalescedEvents?.() ?? [];
  marks.at(-1).points.push(...(events.length ? events : [event]).map(place));
  update();
});
for (const name of ["pointerup", "pointercancel"]) {
  paper.addEventListener(name, (event) => {
    if (event.pointerId === pointer) pointer = null;
  });
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

paper.addEventListener("keydown", (event) => {
  const arrow = ARROWS[event.key];
  if (!arrow && event.key !== " ") return;
  event.preventDefault();
  pen ??= { x: SIZE / 2, y: SIZE / 4, down: false };
  if (arrow) {
    const moved = (from, steps) => Math.min(Math.max(from + (event.shiftKey ? 2 : 6) * steps, MARGIN), SIZE - MARGIN);
    pen = { ...pen, x: moved(pen.x, arrow[0]), y: moved(pen.y, arrow[1]) };
    if (pen.down) marks.at(-1).points.push([pen.x, pen.y]);
  } else {
    pen.down = !pen.down;
    if (pen.down) begin([pen.x, pen.y]);
  }
  update();
});
paper.addEventListener("blur", () => {
  pen = null;
  update();
});

function change(left) {
  if (pointer !== null) return;
  if (pen) pen.down = false;
  marks = left;
  update();
}
element("clear").addEventListener("click", () => change([]));
element("undo").addEventListener("click", () => change(marks.slice(0, -1)));
document.addEventListener("keydown", (event) => {
  if (event.key.toLowerCase() !== "z" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  change(marks.slice(0, -1));
});

// --- a picture ------------------------------------------------------------------------------------------------------

async function open(file) {
  if (!file) return;
  say("Reading the picture", "");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    say("This file is not a picture that a browser can read", "");
    return;
  }
  const scale = AREA / Math.max(bitmap.width, bitmap.height);
  const exact = network.anyPicture && bitmap.width === 28 && bitmap.height === 28;
  const [width, height] = exact ? [28, 28] : [bitmap.width, bitmap.height].map((n) => Math.max(1, Math.round(n * scale)));
  const small = new OffscreenCanvas(width, height).getContext("2d");
  small.imageSmoothingQuality = "high";
  small.drawImage(bitmap, 0, 0, width, height);
  const pixels = small.getImageData(0, 0, width, height);
  // A network of other things than digits takes 28×28 as it is.
  const digit = exact ? Uint8Array.from({ length: 784 }, (_, i) => pixels.data[4 * i]) : null;
  const ink = digit ?? pictureInk(pixels.data, width);
  ink.forEach((value, i) => pixels.data.set([255, 255, 255, value], 4 * i));
  small.putImageData(pixels, 0, 0);
  const canvas = new OffscreenCanvas(SIZE, SIZE);
  const [shownWidth, shownHeight] = exact ? [AREA, AREA] : [width, height];
  canvas.getContext("2d").drawImage(small.canvas, (SIZE - shownWidth) / 2, (SIZE - shownHeight) / 2, shownWidth, shownHeight);
  change([{ canvas, digit }]);
}
element("file").addEventListener("change", (event) => {
  open(event.target.files[0]);
  event.target.value = "";
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  open(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => open(event.clipboardData.files[0]));

// --- the answer -----------------------------------------------------------------------------------------------------

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const bars = network.classes.map((name) => {
  const row = document.createElement("li");
  for (const kind of ["name", "track", "value"]) {
    row.append(Object.assign(document.createElement("span"), { className: kind }));
  }
  row.children[0].textContent = name;
  row.children[1].append(Object.assign(document.createElement("div"), { className: "bar" }));
  return row;
});
element("bars").append(...bars);
element("bars").classList.toggle("many", bars.length > 12);
const longest = Math.max(...network.classes.map((name) => name.length));
element("bars").style.setProperty("--name", `max(1.5rem, ${0.7 * Math.min(longest, 10)}rem)`);
element("title").textContent = document.title = INVITATION;

let speaking = 0;

/** Show the answer at once; a screen reader hears it when the drawing rests. */
function say(answer, confidence, sure = false) {
  element("answer").textContent = answer;
  element("answer").classList.toggle("sure", sure);
  element("answer").classList.toggle("short", answer.length <= 3);
  element("confidence").textContent = confidence;
  clearTimeout(speaking);
  speaking = setTimeout(() => (element("spoken").textContent = `${answer} ${confidence}`), 600);
}

function show(probabilities) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const [first, second] = order.map((i) => `${network.classes[i]} (${percent(probabilities[i])})`);
  const probability = probabilities[order[0]];
  const likely = probability >= Math.min(0.5, UNSURE_BELOW);
  if (probability >= UNSURE_BELOW) say(network.classes[order[0]], percent(probability), true);
  else if (likely) say(network.classes[order[0]], `${percent(probability)}, unsure: perhaps ${second}`);
  else say("Not sure", `perhaps ${first} or ${second}`);
  bars.forEach((row, i) => {
    row.classList.toggle("best", likely && i === order[0]);
    row.querySelector(".bar").style.transform = `scaleX(${probabilities[i]})`;
    row.children[2].textContent = percent(probabilities[i]);
  });
}

function showNothing(message) {
  say(message, "");
  for (const row of bars) {
    row.classList.remove("best");
    row.querySelector(".bar").style.transform = "scaleX(0)";
    row.children[2].textContent = "";
  }
}

// --- the layers -----------------------------------------------------------------------------------------------------

let colours = []; // RGBA as one number, from the strongest negative through zero to the strongest positive: 511 of them

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const [zero, positive, negative] = ["--zero", "--positive", "--negative"].map((name) =>
    style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16)),
  );
  colours = Uint32Array.from({ length: 511 }, (_, i) => {
    const part = (Math.abs(i - 255) / 255) ** 0.7; // faint ones are seen too
    const [red, green, blue] = zero.map((from, c) => from + part * ((i < 255 ? negative : positive)[c] - from));
    return (255 << 24) | (blue << 16) | (green << 8) | red;
  });
}

/** Numbers as an image of this width, in colours of which the strongest are `most`. */
function coloured(values, width, most) {
  const image = new ImageData(width, values.length / width);
  const pixels = new Uint32Array(image.data.buffer);
  const scale = most ? 255 / most : 0;
  for (let i = 0; i < pixels.length; i++) pixels[i] = colours[255 + Math.round(values[i] * scale)];
  return image;
}

const strongest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

/** A part's steps in words. */
function describe(steps) {
  const words = {
    flatten: () => [],
    dense: () => [],
    convolution: (step) => [
      `${step.depthwise ? "separable " : ""}${step.kernel}×${step.kernel} convolution`,
      ...(step.stride > 1 ? [`stride ${step.stride}`] : []),
    ],
    residual: (step) => [...describe(step.layers).slice(0, 1), "input added"],
    activation: (step) => [step.name.replace("_", " ")],
    norm: () => ["batch norm"],
    pool: (step) => [`then ${step.name === "avg" ? "average" : "max"} pooling ${step.size}×${step.size}`],
  };
  const separable = steps[0].depthwise ? [steps[0], ...steps.slice(2)] : steps;
  return separable.flatMap((step) => words[step.kind](step));
}

/** The kernel of a filter or the weights of a unit: for each of `count` inputs a square of `side`². */
function kernel(number, index) {
  const [step, across] = network.parts[number].steps.flatMap((each) => each.layers ?? [each]).filter((each) => each.weight);
  if (step.kind === "convolution") {
    const area = step.kernel ** 2;
    const length = across ? step.weight.length : step.weight.length / step.filters;
    const values = Float64Array.from({ length }, (_, i) =>
      across ? step.weight[i] * across.weight[(index * length) / area + Math.floor(i / area)] : step.weight[index * length + i],
    );
    return { count: length / area, side: step.kernel, values };
  }
  const length = step.weight.length / step.filters;
  const row = step.weight.subarray(index * length, (index + 1) * length);
  if (network.parts[number].steps[0].kind !== "flatten") return { count: length, side: 1, values: row };
  const count = number ? atlases[number - 1].tensor.channels : 1;
  const area = length / count;
  const values = row.map((_, i) => row[(i % area) * count + Math.floor(i / area)]);
  return { count, side: Math.sqrt(area), values };
}

/** All maps of one part on one canvas. */
class Atlas {
  constructor(number, tensor) {
    Object.assign(this, { number, tensor, selected: null, empty: true, seen: false });
    const { title, steps } = network.parts[number];
    const { channels, height, width } = tensor;
    const size = height * width === 1 ? `${channels} units` : `${channels} maps of ${height}×${width}`;
    const heading = Object.assign(document.createElement("h3"), { textContent: `${title}: ${size}` });
    const about = Object.assign(document.createElement("p"), { className: "note", textContent: describe(steps).join(", ") });
    this.unit = height * width === 1 ? "Unit" : "Map";
    this.canvas = Object.assign(document.createElement("canvas"), { className: "maps", tabIndex: 0 });
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", `${title}: ${size}. Arrow keys go from one to the next.`);
    this.strip = new OffscreenCanvas(width, height * channels).getContext("2d");
    element("layers").append(heading, about, this.canvas);
    new IntersectionObserver(([{ isIntersecting }]) => {
      this.seen = isIntersecting;
      this.draw();
    }).observe(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.select(this.at(event)));
    this.canvas.addEventListener("pointerdown", (event) => this.select(this.at(event)));
    this.canvas.addEventListener("pointerleave", () => this.select(null));
    this.canvas.addEventListener("blur", () => this.select(null));
    this.canvas.addEventListener("keydown", (event) => {
      const arrow = ARROWS[event.key];
      if (!arrow) return;
      event.preventDefault();
      const to = this.selected === null ? 0 : this.selected + arrow[0] + arrow[1] * this.columns;
      if (to >= 0 && to < channels) this.select(to);
    });
  }

  layOut(available) {
    const { channels, height, width } = this.tensor;
    const wished = height * width === 1 ? 18 : channels <= 16 ? 64 : channels <= 64 ? 48 : 32;
    this.gap = height * width === 1 ? 2 : 3;
    const least = (available < 500 ? 0.7 : 1) * wished + this.gap;
    const fitting = Math.max(1, Math.floor((available + this.gap) / least));
    this.tile = Math.floor((available + this.gap) / fitting) - this.gap;
    this.columns = Math.min(channels, fitting);
    const rows = Math.ceil(channels / this.columns);
    const [w, h] = [this.columns, rows].map((count) => count * (this.tile + this.gap) - this.gap);
    Object.assign(this.canvas.style, { width: `${w}px`, height: `${h}px` });
    Object.assign(this.canvas, { width: w * devicePixelRatio, height: h * devicePixelRatio });
    this.draw();
  }

  /** Draw the maps anew, if they are in view; null: there is no drawing. */
  draw(tensor = this.empty ? null : this.tensor) {
    this.empty = tensor === null;
    this.tensor = tensor ?? { ...this.tensor, data: this.tensor.data.map(() => 0) };
    if (!this.seen) return;
    const { channels, height, width, data } = this.tensor;
    this.strip.putImageData(coloured(data, width, strongest(data)), 0, 0);
    const context = this.canvas.getContext("2d");
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (let i = 0; i < channels; i++) {
      const [x, y] = this.corner(i);
      context.drawImage(this.strip.canvas, 0, i * height, width, height, x, y, this.tile, this.tile);
    }
    if (this.selected !== null) {
      const [x, y] = this.corner(this.selected);
      context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--text");
      context.lineWidth = 2;
      context.strokeRect(x + 1, y + 1, this.tile - 2, this.tile - 2);
      this.enlarge();
    }
  }

  corner(index) {
    return [index % this.columns, Math.floor(index / this.columns)].map((place) => place * (this.tile + this.gap));
  }

  at(event) {
    const [column, row] = [event.offsetX, event.offsetY].map((offset) => Math.floor(offset / (this.tile + this.gap)));
    const index = row * this.columns + column;
    return column >= 0 && column < this.columns && index >= 0 && index < this.tensor.channels ? index : null;
  }

  select(index) {
    if (index === this.selected) return;
    this.selected = index;
    element("lens").hidden = index === null;
    this.draw();
    if (index === null) return;
    const lens = element("lens").getBoundingClientRect();
    const canvas = this.canvas.getBoundingClientRect();
    const [x, y] = this.corner(index);
    const left = Math.min(Math.max(8, canvas.left + x - lens.width / 2), innerWidth - lens.width - 8);
    const above = canvas.top + y - lens.height - 8;
    const top = above > 8 ? above : canvas.top + y + this.tile + 8;
    Object.assign(element("lens").style, { left: `${left}px`, top: `${top}px` });
  }

  /** The selected map and its kernel in the lens. */
  enlarge() {
    const { channels, height, width, data } = this.tensor;
    const [map, weights] = element("lens").querySelectorAll("canvas");
    const values = data.subarray(this.selected * height * width, (this.selected + 1) * height * width);
    Object.assign(map, { width, height });
    map.getContext("2d").putImageData(coloured(values, width, strongest(values)), 0, 0);
    const { count, side, values: numbers } = kernel(this.number, this.selected);
    const columns = Math.ceil(Math.sqrt(count));
    const step = side + (side > 1 ? 1 : 0);
    Object.assign(weights, { width: columns * step - (step - side), height: Math.ceil(count / columns) * step - (step - side) });
    const image = coloured(numbers, side, strongest(numbers));
    for (let i = 0; i < count; i++) {
      const [x, y] = [(i % columns) * step, Math.floor(i / columns) * step];
      weights.getContext("2d").putImageData(image, x, y - i * side, 0, i * side, side, side);
    }
    const most = values.reduce((a, b) => Math.max(a, b));
    const inputs = count > 1 ? `${count} inputs` : "the picture";
    const size = side > 1 ? `${side}×${side} for ` : "";
    element("lens").querySelector("figcaption").textContent =
      `${this.unit} ${this.selected + 1} of ${channels}: ${this.empty ? "nothing yet" : `at most ${most.toFixed(2)}`}. ` +
      `${this.unit === "Map" ? "Its kernel" : "Its weights"}: ${size}${inputs}.`;
  }
}

// --- all of it ------------------------------------------------------------------------------------------------------

element("layers").hidden = !network.parts.length;
const atlases = forward(network, new Uint8Array(784)).maps.map((tensor, number) => new Atlas(number, tensor));

/** Look at the drawing, at most once a frame. */
function update() {
  waiting ||= requestAnimationFrame(() => {
    waiting = 0;
    look();
  });
}

function look() {
  const context = paper.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  paint(context, MARGIN, AREA, style.getPropertyValue("--ink"));
  if (pen) {
    context.beginPath();
    context.arc(pen.x, pen.y, element("stroke").value / 2, 0, 2 * Math.PI);
    context.lineWidth = 1.5;
    context.setLineDash(pen.down ? [] : [3, 3]);
    context.strokeStyle = style.getPropertyValue("--positive");
    context.stroke();
    context.setLineDash([]);
  }
  for (const id of ["clear", "undo"]) element(id).disabled = !marks.length;
  const digit = marks.at(-1)?.digit ?? mnistForm(drawing());
  const seen = new ImageData(28, 28);
  for (let i = 0; i < 784; i++) seen.data.set([digit?.[i] ?? 0, digit?.[i] ?? 0, digit?.[i] ?? 0, 255], 4 * i);
  element("seen").getContext("2d").putImageData(seen, 0, 0);
  if (digit) {
    const { probabilities, maps } = forward(network, digit);
    show(probabilities);
    atlases.forEach((atlas, i) => atlas.draw(maps[i]));
  } else {
    const drawn = "Draw on: there is too little yet, or too much";
    showNothing(!marks.length ? INVITATION : marks.at(-1).canvas ? "There is no digit in this picture" : drawn);
    atlases.forEach((atlas) => atlas.draw(null));
  }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  element("theme").textContent = name === "dark" ? "Light theme" : "Dark theme";
  readColours();
  update();
}
const darkness = matchMedia("(prefers-color-scheme: dark)");
darkness.addEventListener("change", () => setTheme(darkness.matches ? "dark" : "light"));
element("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
});
setTheme(darkness.matches ? "dark" : "light");

new ResizeObserver(() => {
  paper.width = paper.height = Math.round(paper.clientWidth * devicePixelRatio);
  for (const atlas of atlases) atlas.layOut(element("layers").clientWidth);
  update();
}).observe(document.body);
