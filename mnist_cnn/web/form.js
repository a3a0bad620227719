"use strict";
// A drawing to what the network sees. The same steps as pictures/ink.py and pictures/digit_image.py take where the paper
// is even; tests compare them. Ink and masks are Float64Arrays, one number a pixel of a square of SIZE × SIZE, with nothing
// along its edge.

const SIZE = 192; // pictures/ink.py looks at pictures of this size as they are
const DIGIT_SIZE = 20; // the digit's longer side, in pixels of 28×28
const CENTRE = 14; // the pixel in which MNIST's centres of mass lie
const MINIMUM_CONTRAST = 10; // of 255
const MINIMUM_SIDE = 8;
const STROKE_LEVEL = 0.35; // of full ink: above it a pixel belongs to a stroke
const FAINT_LEVEL = 0.2; // above it a pixel beside a stroke belongs to it
const REACH = 3; // pixels: parts of one stroke are nearer
const SMALL_PART = 0.08; // of the largest part: smaller parts are specks
const MAXIMUM_PARTS = 6;
const MINIMUM_OUTLINE = 0.85; // of a box's outline: a frame fills more
const EDGE_LEVEL = 0.3; // of a profile's height: where the digit begins
const MINIMUM_STROKE = 1.5; // in pixels of 28×28: thinner strokes are made bolder
const BOLD_STROKE = 2; // how wide they become

/** The value below which a fraction of sorted numbers lies, as numpy's percentile. */
function quantile(sorted, fraction) {
  const place = fraction * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (place - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

/** A mask grown by `times` pixels to the four sides. */
function dilate(mask, times) {
  for (; times > 0; times--) {
    const before = mask;
    mask = before.slice();
    for (let i = SIZE; i < mask.length - SIZE; i++) {
      if (before[i - 1] || before[i + 1] || before[i - SIZE] || before[i + SIZE]) mask[i] = 1;
    }
  }
  return mask;
}

const NEIGHBOURS = [-SIZE - 1, -SIZE, 1 - SIZE, -1, 1, SIZE - 1, SIZE, SIZE + 1];

/** Labels of a mask's parts, from 1, and how many pixels of `counted` each has. */
function parts(mask, counted) {
  const labels = new Int32Array(mask.length);
  const sizes = [0];
  for (let start = 0; start < mask.length; start++) {
    if (!mask[start] || labels[start]) continue;
    const label = sizes.push(0) - 1;
    const open = [start];
    labels[start] = label;
    while (open.length) {
      const at = open.pop();
      sizes[label] += counted[at];
      for (const step of NEIGHBOURS) {
        if (mask[at + step] && !labels[at + step]) {
          labels[at + step] = label;
          open.push(at + step);
        }
      }
    }
  }
  return { labels, sizes };
}

/** Ink 0–255 to 0–1, without specks; null where there is no digit. */
function digitInk(pixels) {
  const inked = pixels.filter((value) => value >= MINIMUM_CONTRAST).sort();
  if (inked.length < 4) return null;
  const full = quantile(inked.filter((value) => value >= inked.at(-4) / 2), 0.9);
  const mask = new Uint8Array(pixels.length), faint = new Uint8Array(pixels.length);
  for (let i = 0; i < pixels.length; i++) {
    if (pixels[i] / full > STROKE_LEVEL) mask[i] = 1;
    if (pixels[i] / full > FAINT_LEVEL) faint[i] = 1;
  }
  const { labels, sizes } = parts(dilate(faint, REACH), mask);
  const least = SMALL_PART * Math.max(...sizes);
  const kept = sizes.map((size) => (size > 0 && size >= least ? 1 : 0));
  if (kept.filter(Boolean).length > MAXIMUM_PARTS) return null;
  for (let i = 0; i < faint.length; i++) faint[i] *= kept[labels[i]];
  const near = dilate(faint, 2);
  const ink = new Float64Array(pixels.length);
  for (let i = 0; i < ink.length; i++) if (near[i]) ink[i] = Math.min(pixels[i] / full, 1);
  return ink;
}

/** The greatest ink of each row and of each column. */
function profiles(ink) {
  const rows = new Float64Array(SIZE), columns = new Float64Array(SIZE);
  for (let row = 0, i = 0; row < SIZE; row++) {
    for (let column = 0; column < SIZE; column++, i++) {
      if (ink[i] > rows[row]) rows[row] = ink[i];
      if (ink[i] > columns[column]) columns[column] = ink[i];
    }
  }
  return [rows, columns];
}

/** Where a profile first and last crosses EDGE_LEVEL of its height, in fractions of a pixel. */
function edges(profile) {
  const level = EDGE_LEVEL * Math.max(...profile);
  const first = profile.findIndex((value) => value >= level);
  const last = profile.findLastIndex((value) => value >= level);
  const before = profile[first - 1] ?? 0, after = profile[last + 1] ?? 0;
  return [
    first + 0.5 - (profile[first] - level) / (profile[first] - before),
    last + 0.5 + (profile[last] - level) / (profile[last] - after),
  ];
}

/** Ink with thin strokes made about as wide as MNIST's pen; scaled down by `scale` they would fade. */
function thicken(ink, scale) {
  let area = 0, outline = 0;
  for (let i = 0; i < ink.length - SIZE; i++) {
    const inside = ink[i] > 0.5;
    if (inside) area++;
    if (inside !== ink[i + 1] > 0.5) outline++;
    if (inside !== ink[i + SIZE] > 0.5) outline++;
  }
  const missing = (MINIMUM_STROKE / scale - (2.5 * area) / (outline + 1)) / 2;
  if (scale > 0.5 || missing < 0.5) return ink;
  const reach = Math.round(missing + (BOLD_STROKE - MINIMUM_STROKE) / scale / 2);
  const bold = ink.slice();
  ink.forEach((value, i) => {
    if (!value) return;
    for (let y = -reach; y <= reach; y++) {
      for (let x = -reach; x <= reach; x++) {
        const at = i + y * SIZE + x;
        if (x * x + y * y <= reach * reach + 0.5 && bold[at] < value) bold[at] = value;
      }
    }
  });
  return bold;
}

const FILTERS = {
  box: { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bicubic: {
    support: 2,
    weight: (x) => {
      x = Math.abs(x);
      return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
    },
  },
};

/** Rows of ink scaled as Pillow does it: the part from `start` to `end` of each to `count` numbers; columns are rows after. */
function resample(ink, width, start, end, count, { support, weight }) {
  const scale = (end - start) / count;
  const blur = Math.max(scale, 1);
  const height = ink.length / width;
  const scaled = new Float64Array(count * height);
  for (let place = 0; place < count; place++) {
    const centre = start + (place + 0.5) * scale;
    // The filter finds two pixels of paper beyond the edge, as in digit_image.py.
    const from = Math.max(-2, Math.floor(centre - support * blur + 0.5));
    const to = Math.min(width + 2, Math.floor(centre + support * blur + 0.5));
    const weights = [];
    for (let x = from; x < to; x++) weights.push(weight((x - centre + 0.5) / blur));
    const total = weights.reduce((sum, each) => sum + each, 0);
    for (let row = 0; row < height; row++) {
      let sum = 0;
      for (let x = Math.max(from, 0); x < Math.min(to, width); x++) sum += (weights[x - from] / total) * ink[row * width + x];
      scaled[place * height + row] = sum; // turned, so that the next call scales the other side
    }
  }
  return scaled;
}

/** What of a drawing lies within a frame, if that is what has been drawn: it fills the outline of a box; else null. */
function withinFrame(drawing, ink) {
  const filled = (at, step, count) => {
    let sum = 0;
    for (const end = at + count * step; at < end; at += step) if (ink[at] > STROKE_LEVEL) sum++;
    return sum;
  };
  // First and last row and column with ink, and then those that ink fills for the most part.
  const [rows, columns] = profiles(ink).map((profile) => {
    const inside = (value) => value > STROKE_LEVEL;
    return [profile.findIndex(inside), profile.findLastIndex(inside)];
  });
  const count = ([first, last]) => last + 1 - first;
  const box = (lines, across, step, stepAcross) => {
    const full = (_, i) => filled(i * step + across[0] * stepAcross, stepAcross, count(across)) > count(across) / 2;
    const found = [...Array(SIZE).keys()].filter((i) => i >= lines[0] && i <= lines[1] && full(0, i));
    return [found[0] ?? 0, found.at(-1) ?? 0];
  };
  const [vertical, horizontal] = [box(rows, columns, SIZE, 1), box(columns, rows, 1, SIZE)];
  const [height, width] = [vertical, horizontal].map(count);
  if (Math.min(height, width) <= Math.max(12, 0.45 * Math.max(height, width))) return null;
  if (height * width < (count(rows) * count(columns)) / 2) return null;
  let outline = 0;
  for (const row of vertical) outline += filled(row * SIZE + horizontal[0], 1, width);
  for (const column of horizontal) outline += filled(vertical[0] * SIZE + column, SIZE, height);
  if (outline < MINIMUM_OUTLINE * 2 * (height + width)) return null;
  const inside = (at, [first, last], size) => at > first + Math.floor(size / 10) && at < last - Math.floor(size / 10);
  return drawing.map((value, i) =>
    inside(Math.floor(i / SIZE), vertical, height) && inside(i % SIZE, horizontal, width) ? value : 0,
  );
}

/** A drawing, SIZE × SIZE numbers 0–255, to MNIST's form: 784 pixels 0–255; null where there is no digit. */
function mnistForm(drawing) {
  let ink = digitInk(drawing);
  if (!ink) return null;
  const framed = withinFrame(drawing, ink);
  const within = framed && mnistForm(framed);
  if (within) return within;
  const sides = profiles(ink);
  if (Math.max(...sides.map((profile) => profile.filter((value) => value > 0).length)) < MINIMUM_SIDE) return null;
  const [[top, bottom], [left, right]] = sides.map(edges);
  const scale = DIGIT_SIZE / Math.max(bottom - top, right - left);
  const height = Math.max(1, Math.round((bottom - top) * scale));
  const width = Math.max(1, Math.round((right - left) * scale));
  const filter = scale < 0.25 ? FILTERS.box : FILTERS.bicubic;
  ink = resample(thicken(ink, scale), SIZE, left, right, width, filter);
  ink = resample(ink, SIZE, top, bottom, height, filter).map((value) => Math.min(Math.max(value, 0), 1));
  const most = Math.max(...ink);
  let total = 0, y = 0, x = 0;
  ink.forEach((value, i) => {
    total += value;
    y += value * Math.floor(i / width);
    x += value * (i % width);
  });
  // Moved by whole pixels only, as MNIST's authors did, so that the digit stays as sharp as it is.
  const row = Math.min(Math.max(Math.round(CENTRE - y / total), 0), 28 - height);
  const column = Math.min(Math.max(Math.round(CENTRE - x / total), 0), 28 - width);
  const digit = new Uint8Array(784);
  ink.forEach((value, i) => {
    digit[(row + Math.floor(i / width)) * 28 + column + (i % width)] = Math.round((255 * value) / most);
  });
  return digit;
}

/** A picture's pixels (count of R, G, B, A) to ink 0–255: how much each differs from the paper; the strongest is 255. */
function pictureInk(pixels, width) {
  const count = pixels.length / 4;
  const height = count / width;
  const channel = (i, c) => 255 + ((pixels[4 * i + c] - 255) * pixels[4 * i + 3]) / 255; // on white where transparent
  const border = [];
  for (let i = 0; i < count; i++) {
    const row = Math.floor(i / width), column = i % width;
    if (row === 0 || column === 0 || row === height - 1 || column === width - 1) border.push(i);
  }
  const paper = [0, 1, 2].map((c) => quantile(border.map((i) => channel(i, c)).sort((a, b) => a - b), 0.5));
  const difference = (i) => paper.map((level, c) => channel(i, c) - level);
  let first = [0, 0, 0];
  for (let i = 0; i < count; i++) {
    const found = difference(i);
    if (Math.hypot(...found) > Math.hypot(...first)) first = found;
  }
  if (Math.max(...first.map(Math.abs)) < MINIMUM_CONTRAST) return new Float64Array(count);
  const square = first.reduce((sum, value) => sum + value * value, 0);
  // Along the ink's own colour; what differs to the other side, as light on dark ink, is none.
  return Float64Array.from({ length: count }, (_, i) => {
    const along = difference(i).reduce((sum, value, c) => sum + value * first[c], 0) / square;
    return 255 * Math.min(Math.max(along, 0), 1);
  });
}
