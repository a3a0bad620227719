"use strict";
// The network's forward pass, and nothing else. A tensor is {channels, height, width, data}: one plane a channel.

function tensor(channels, height, width, data = new Float64Array(channels * height * width)) {
  return { channels, height, width, data };
}

/** Weights in base64, float32 or float16, as Float64Array: arithmetic in one type is the quickest. */
function decode(base64, half) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  if (!half) return Float64Array.from(new Float32Array(bytes.buffer));
  return Float64Array.from(new Uint16Array(bytes.buffer), (bits) => {
    const exponent = (bits >> 10) & 31;
    const size = exponent ? 2 ** (exponent - 25) * (1024 + (bits & 1023)) : 2 ** -24 * (bits & 1023);
    return bits & 0x8000 ? -size : size;
  });
}

/** Give each step its arrays: the file has them one after the other, in the order of the steps. */
function attach(steps, weights, offset = 0) {
  for (const step of steps) {
    for (const [name, length] of Object.entries(step.arrays ?? {})) {
      step[name] = weights.subarray(offset, offset + length);
      offset += length;
    }
    for (const inner of [step.layers, step.shortcut]) if (inner) offset = attach(inner, weights, offset);
  }
  return offset;
}

/** Weights (filters, length) to (length, filters), with filters of zeros up to a multiple of 8. */
function turn(weight, filters) {
  const wide = 8 * Math.ceil(filters / 8);
  const length = weight.length / filters;
  const turned = new Float64Array(length * wide);
  for (let i = 0; i < weight.length; i++) turned[(i % length) * wide + Math.floor(i / length)] = weight[i];
  return { turned, wide, length };
}

/** A convolution whose filters see all channels, of an input that is padded already; its weights are turned once. */
function convolve(x, step, height, width) {
  const { filters, kernel, stride, bias } = step;
  const { turned, wide, length } = (step.turned ??= turn(step.weight, filters));
  const result = tensor(filters, height, width);
  const values = new Float64Array(length);
  const rows = new Int32Array(length); // where the weights of each value begin
  const sums = new Float64Array(wide);
  for (let place = 0; place < height * width; place++) {
    // What the filters see here, without the zeros: after relu they are many.
    let count = 0, weights = 0;
    for (let line = 0; line < x.channels * kernel; line++) {
      const row = Math.floor(line / kernel) * x.height + Math.floor(place / width) * stride + (line % kernel);
      let at = row * x.width + (place % width) * stride;
      for (const end = at + kernel; at < end; at++, weights += wide) {
        if (x.data[at] === 0) continue;
        values[count] = x.data[at];
        rows[count++] = weights;
      }
    }
    // Eight filters at once: each value that is read serves all of them, and their sums stay in registers.
    for (let filter = 0; filter < wide; filter += 8) {
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
      for (let i = 0; i < count; i++) {
        const value = values[i], w = rows[i] + filter;
        s0 += value * turned[w]; s1 += value * turned[w + 1]; s2 += value * turned[w + 2]; s3 += value * turned[w + 3];
        s4 += value * turned[w + 4]; s5 += value * turned[w + 5]; s6 += value * turned[w + 6]; s7 += value * turned[w + 7];
      }
      sums[filter] = s0; sums[filter + 1] = s1; sums[filter + 2] = s2; sums[filter + 3] = s3;
      sums[filter + 4] = s4; sums[filter + 5] = s5; sums[filter + 6] = s6; sums[filter + 7] = s7;
    }
    for (let filter = 0; filter < filters; filter++) {
      result.data[filter * height * width + place] = sums[filter] + (bias ? bias[filter] : 0);
    }
  }
  return result;
}

/** A tensor with `padding` rows and columns of zeros on each side. */
function pad(x, padding) {
  if (!padding) return x;
  const padded = tensor(x.channels, x.height + 2 * padding, x.width + 2 * padding);
  for (let line = 0; line < x.channels * x.height; line++) {
    const channel = Math.floor(line / x.height);
    const row = channel * padded.height + padding + (line % x.height);
    padded.data.set(x.data.subarray(line * x.width, (line + 1) * x.width), row * padded.width + padding);
  }
  return padded;
}

/** erf by Abramowitz and Stegun, 7.1.26: right to 1.5e-7. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

const ACTIVATIONS = {
  relu: (x) => (x > 0 ? x : 0),
  leaky_relu: (x) => (x > 0 ? x : 0.01 * x),
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  silu: (x) => x / (1 + Math.exp(-x)),
  tanh: Math.tanh,
  sigmoid: (x) => 1 / (1 + Math.exp(-x)),
};

const STEPS = {
  convolution(x, step) {
    const { filters, kernel, stride, padding, depthwise, weight } = step;
    const padded = pad(x, padding);
    const height = Math.floor((padded.height - kernel) / stride) + 1;
    const width = Math.floor((padded.width - kernel) / stride) + 1;
    if (!depthwise) return convolve(padded, step, height, width);
    const each = tensor(filters, height, width);
    for (let i = 0; i < weight.length; i++) {
      const [channel, y, x] = [Math.floor(i / kernel ** 2), Math.floor(i / kernel) % kernel, i % kernel];
      for (let row = 0; row < height; row++) {
        let from = (channel * padded.height + row * stride + y) * padded.width + x;
        const end = (channel * height + row + 1) * width;
        for (let at = end - width; at < end; at++, from += stride) each.data[at] += weight[i] * padded.data[from];
      }
    }
    return each;
  },

  /** Batch norm that stands after an activation: a scale and a shift for each channel. */
  norm(x, { scale, shift }) {
    const size = x.height * x.width;
    const data = x.data.map((value, i) => value * scale[Math.floor(i / size)] + shift[Math.floor(i / size)]);
    return { ...x, data };
  },

  activation(x, { name }) {
    return { ...x, data: x.data.map(ACTIVATIONS[name]) };
  },

  residual(x, { layers, shortcut }) {
    const sum = apply(layers, x);
    const input = apply(shortcut, x);
    return { ...sum, data: sum.data.map((value, i) => value + input.data[i]) };
  },

  pool(x, { name, size }) {
    const pooled = tensor(x.channels, Math.floor(x.height / size), Math.floor(x.width / size));
    let at = 0;
    for (let channel = 0; channel < x.channels; channel++) {
      for (let row = 0; row < pooled.height; row++) {
        for (let column = 0; column < pooled.width; column++) {
          let sum = 0, most = -Infinity;
          for (let y = 0; y < size; y++) {
            const from = (channel * x.height + row * size + y) * x.width + column * size;
            for (let i = from; i < from + size; i++) {
              sum += x.data[i];
              if (x.data[i] > most) most = x.data[i];
            }
          }
          pooled.data[at++] = name === "avg" ? sum / (size * size) : most;
        }
      }
    }
    return pooled;
  },

  /** The channels last, as the dense layer's weights have them. */
  flatten(x) {
    const size = x.height * x.width;
    const data = x.data.map((_, i) => x.data[(i % x.channels) * size + Math.floor(i / x.channels)]);
    return tensor(x.data.length, 1, 1, data);
  },

  dense(x, step) {
    return convolve(x, step, 1, 1);
  },
};

function apply(steps, x) {
  return steps.reduce((value, step) => STEPS[step.kind](value, step), x);
}

/** A digit of 784 pixels 0–255 to probabilities, and each part's tensor: after the activation, before pooling. */
function forward(network, digit) {
  let x = tensor(1, 28, 28, Float64Array.from(digit, (pixel) => (pixel - network.mean) / network.std));
  const maps = network.parts.map(({ steps }) => {
    const pool = steps.findIndex((step) => step.kind === "pool");
    const map = apply(pool < 0 ? steps : steps.slice(0, pool), x);
    x = pool < 0 ? map : apply(steps.slice(pool), map);
    return map;
  });
  const logits = apply(network.output, x).data.map((logit) => logit / network.temperature);
  const most = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const total = powers.reduce((sum, power) => sum + power);
  return { probabilities: powers.map((power) => power / total), maps };
}
