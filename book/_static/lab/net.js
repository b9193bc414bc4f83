// The lab's arithmetic, without a page: networks, their gradients by the image, attacks. An image is an array of
// 28 x 28 numbers in [0, 1], row by row. tests/book/test_lab.py compares all of it with Keras and helpers.attacks.
window.lab = (() => {
  "use strict";
  const SIDE = 28;
  const CLASSES = 10;

  // ── weights.js ────────────────────────────────────────────────────────────────────────────────────────────────────

  // The bytes of a packed part of weights.js; an Error where they are not those that were written.
  function unpack(packed, name) {
    const text = atob(packed.base64);
    const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    if (bytes.length !== packed.bytes || adler32(bytes) !== packed.adler32) throw Error(`${name} is damaged`);
    return bytes;
  }

  function adler32(bytes) {
    let [low, high] = [1, 0];
    for (const byte of bytes) {
      low = (low + byte) % 65521;
      high = (high + low) % 65521;
    }
    return high * 65536 + low;
  }

  // 16-bit floating-point numbers: a sign, 5 bits of exponent, 10 of fraction.
  function halves(bytes) {
    return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
      const bits = bytes[2 * i] + 256 * bytes[2 * i + 1];
      const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, (bits & 1023) / 1024];
      return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
    });
  }

  // Two convolutions, a dense layer, logits: the numbers one after the other, kernel before bias, as Keras has them.
  function network(numbers, [first, second, hidden]) {
    let at = 0;
    const take = (n) => numbers.subarray(at, (at += n));
    const convolution = (side, ins, outs) => ({ side, ins, outs, kernel: take(9 * ins * outs), bias: take(outs),
      taps: taps(side), forward: convolve, backward: convolveBack });
    const dense = (ins, outs) => ({ ins, outs, kernel: take(ins * outs), bias: take(outs),
      forward: multiply, backward: multiplyBack });
    const layers = [convolution(SIDE, 1, first), convolution(SIDE / 2, first, second),
      dense((SIDE / 4) ** 2 * second, hidden), dense(hidden, CLASSES)];
    if (at !== numbers.length) throw Error(`${numbers.length} numbers, expected ${at}`);
    return layers;
  }

  // What weights.js holds: networks by name, digits {image, label}, the record. An Error says what is wrong with it.
  function read(data) {
    if (!data) throw Error("it is missing, or was cut short");
    const lost = ["networks", "pixels", "labels", "record"].filter((part) => !data[part]);
    if (lost.length) throw Error(`it lacks ${lost}`);
    const networks = Object.fromEntries(Object.entries(data.networks).map(([name, packed]) =>
      [name, network(halves(unpack(packed, `the ${name} network`)), data.record.size)]));
    const pixels = Float64Array.from(unpack(data.pixels, "the set of digits"), (byte) => byte / 255);
    const digits = data.labels.map((label, i) => ({ label, image: pixels.slice(i * SIDE ** 2, (i + 1) * SIDE ** 2) }));
    return { networks, digits, record: data.record, blur: blurring(data.record.sigma) };
  }

  // ── layers, forwards and backwards ────────────────────────────────────────────────────────────────────────────────

  // Every pair of pixels that a 3x3 convolution of stride 2 joins, as three numbers: where in the output, in the input,
  // in the kernel. Beyond the lower and the right edge there is nothing.
  function taps(side) {
    const found = [];
    for (let to = 0; to < side ** 2 / 4; to++) {
      for (let tap = 0; tap < 9; tap++) {
        const i = 2 * Math.floor(to / (side / 2)) + Math.floor(tap / 3);
        const j = 2 * (to % (side / 2)) + tap % 3;
        if (i < side && j < side) found.push(to, i * side + j, tap);
      }
    }
    return Int32Array.from(found);
  }

  function convolve({ side, taps, ins, outs, kernel, bias }, x) {
    const y = new Float64Array(side ** 2 / 4 * outs);
    for (let i = 0; i < y.length; i++) y[i] = bias[i % outs];
    for (let t = 0; t < taps.length; t += 3) {
      for (let i = 0; i < ins; i++) {
        add(y, taps[t] * outs, outs, x[taps[t + 1] * ins + i], kernel, (taps[t + 2] * ins + i) * outs);
      }
    }
    return y;
  }

  function convolveBack({ side, taps, ins, outs, kernel }, gradient) {
    const back = new Float64Array(side ** 2 * ins);
    for (let t = 0; t < taps.length; t += 3) {
      for (let i = 0; i < ins; i++) {
        back[taps[t + 1] * ins + i] += dot(gradient, taps[t] * outs, outs, kernel, (taps[t + 2] * ins + i) * outs);
      }
    }
    return back;
  }

  function multiply({ ins, outs, kernel, bias }, x) {
    const y = Float64Array.from(bias);
    for (let i = 0; i < ins; i++) add(y, 0, outs, x[i], kernel, i * outs);
    return y;
  }

  function multiplyBack({ ins, outs, kernel }, gradient) {
    const back = new Float64Array(ins);
    for (let i = 0; i < ins; i++) back[i] = dot(gradient, 0, outs, kernel, i * outs);
    return back;
  }

  // y[at ...] += value * kernel[k ...], n numbers.
  function add(y, at, n, value, kernel, k) {
    if (value === 0) return; // most of a digit is black, and so is half of what a ReLU gives
    for (let o = 0; o < n; o++) y[at + o] += value * kernel[k + o];
  }

  // Sum of the products of n numbers.
  function dot(gradient, at, n, kernel, k) {
    let sum = 0;
    for (let o = 0; o < n; o++) sum += gradient[at + o] * kernel[k + o];
    return sum;
  }

  // The outputs of all layers, the image before them; all but the last go through a ReLU.
  function forward(layers, image) {
    const outputs = [image];
    layers.forEach((layer, n) => {
      const y = layer.forward(layer, outputs[n]);
      outputs.push(n < layers.length - 1 ? y.map((value) => Math.max(0, value)) : y);
    });
    return outputs;
  }

  // From the gradient by the logits to that by the image.
  function backward(layers, outputs, gradient) {
    for (let n = layers.length - 1; n >= 0; n--) {
      gradient = layers[n].backward(layers[n], gradient);
      if (n > 0) gradient = gradient.map((value, i) => (outputs[n][i] > 0 ? value : 0));
    }
    return gradient;
  }

  // ── blur ──────────────────────────────────────────────────────────────────────────────────────────────────────────

  // A Gaussian along one side, as a matrix: what lies beyond the edge mirrors what lies within.
  function blurring(sigma) {
    const [reach, matrix] = [Math.floor(4 * sigma + 0.5), new Float64Array(SIDE ** 2)];
    const weights = Array.from({ length: 2 * reach + 1 }, (_, k) => Math.exp(-0.5 * ((k - reach) / sigma) ** 2));
    const total = weights.reduce((a, b) => a + b);
    for (let i = 0; i < SIDE; i++) {
      weights.forEach((weight, k) => {
        const j = i + k - reach;
        matrix[i * SIDE + (j < 0 ? -1 - j : j >= SIDE ? 2 * SIDE - 1 - j : j)] += weight / total;
      });
    }
    return { there: matrix, back: matrix.map((_, i) => matrix[(i % SIDE) * SIDE + Math.floor(i / SIDE)]) };
  }

  // M X M' for square matrices: the rows and the columns of the image X.
  const both = (matrix, image) => product(matrix, product(matrix, image));

  // (M X)', so that applied twice it is M X M'.
  function product(matrix, image) {
    const result = new Float64Array(SIDE ** 2);
    for (let i = 0; i < SIDE; i++) {
      for (let k = 0; k < SIDE; k++) {
        const weight = matrix[i * SIDE + k];
        if (weight !== 0) for (let j = 0; j < SIDE; j++) result[j * SIDE + i] += weight * image[k * SIDE + j];
      }
    }
    return result;
  }

  // ── a defence: {layers, blur, threshold}: a network, a blur in front or null, the probability below which it refuses ─

  const seen = ({ blur }, image) => (blur ? both(blur.there, image) : image);

  const logits = (defence, image) => forward(defence.layers, seen(defence, image)).at(-1);

  function softmax(scores) {
    const largest = Math.max(...scores);
    const odds = Array.from(scores, (score) => Math.exp(score - largest));
    const total = odds.reduce((a, b) => a + b);
    return odds.map((value) => value / total);
  }

  // The class that a defence names, how sure it is of it, and whether it refuses to answer.
  function answer(defence, image) {
    const probabilities = softmax(logits(defence, image));
    const sure = Math.max(...probabilities);
    return { probabilities, sure, named: probabilities.indexOf(sure), refused: sure < defence.threshold };
  }

  // What an attacker has reached: above 0 where the answer is wrong and not refused (helpers.losses.evasion).
  function evasion(scores, label, threshold) {
    const others = scores.map((score, k) => (k === label ? -Infinity : score));
    const margin = Math.max(...others) - scores[label];
    return threshold ? Math.min(margin, Math.log(Math.max(...softmax(scores)) / threshold)) : margin;
  }

  // The gradient of the cross-entropy by the image, and the logits there.
  function climb(defence, image, label) {
    const outputs = forward(defence.layers, seen(defence, image));
    const byLogits = softmax(outputs.at(-1)).map((p, k) => p - (k === label));
    const gradient = backward(defence.layers, outputs, byLogits);
    return { scores: outputs.at(-1), gradient: defence.blur ? both(defence.blur.back, gradient) : gradient };
  }

  // ── attacks ───────────────────────────────────────────────────────────────────────────────────────────────────────

  const length = (change) => Math.sqrt(change.reduce((sum, value) => sum + value * value, 0));

  // The direction that climbs most for its length in the norm.
  function direction(gradient, norm) {
    if (norm === "linf") return gradient.map(Math.sign);
    const largest = gradient.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-30);
    const scaled = gradient.map((value) => value / largest);
    const whole = Math.max(length(scaled), 1e-12);
    return scaled.map((value) => value / whole);
  }

  // The nearest valid image within eps of the original.
  function project(image, original, { norm, eps }) {
    const change = image.map((value, i) => value - original[i]);
    const shrink = norm === "linf" ? 1 : Math.min(1, eps / Math.max(length(change), 1e-12));
    const limit = norm === "linf" ? eps : Infinity;
    return change.map((value, i) => {
      const allowed = Math.max(-limit, Math.min(limit, value * shrink));
      return Math.max(0, Math.min(1, original[i] + allowed));
    });
  }

  // Attack one image: {image, value}, a win where value > 0.
  //   threat: {norm: "linf" or "l2", eps, kind: "fgsm" or "pgd", steps}; PGD begins at the image and keeps the best.
  //   path: the defence whose gradient is followed, where that is another one than what is deployed.
  //   early: stop at the first win.
  function attack(defence, image, label, threat, { path = defence, early = false } = {}) {
    const single = threat.kind === "fgsm";
    const steps = single ? 1 : threat.steps;
    const size = (single ? 1 : 2.5) * threat.eps / steps;
    let best = { image, value: -Infinity };
    let current = image;
    for (let step = 0; step <= steps; step++) {
      const last = step === steps;
      const here = last ? null : climb(path, current, label);
      const scores = here && path === defence ? here.scores : logits(defence, current);
      const value = evasion(scores, label, defence.threshold);
      if (single ? last : value > best.value) best = { image: current, value };
      if (last || (early && !single && best.value > 0)) break;
      const way = direction(here.gradient, threat.norm);
      current = project(current.map((pixel, i) => pixel + size * way[i]), image, threat);
    }
    return best;
  }

  const OUTCOMES = ["right", "refused", "wrong"];

  // What becomes of an image, a number in OUTCOMES.
  function outcome(defence, image, label) {
    const { named, refused } = answer(defence, image);
    return refused ? 1 : named === label ? 0 : 2;
  }

  // ── a drawing, made into what these networks know ─────────────────────────────────────────────────────────────────

  // As MNIST was made: the ink's box scaled to 20 pixels, its centre of mass in the middle. null: there is no ink.
  //   grey: side x side numbers in [0, 1].
  function prepare(grey, side) {
    const ink = [];
    grey.forEach((value, i) => value > 0.1 && ink.push([i % side, Math.floor(i / side), value]));
    if (!ink.length) return null;
    const range = (k) => ink.reduce(([low, high], dot) => [Math.min(low, dot[k]), Math.max(high, dot[k])], [side, 0]);
    const total = ink.reduce((sum, dot) => sum + dot[2], 0);
    const [x, y] = [0, 1].map((k) => ink.reduce((sum, dot) => sum + dot[k] * dot[2], 0) / total);
    const [[left, right], [top, bottom]] = [range(0), range(1)];
    const scale = Math.max(right - left + 1, bottom - top + 1, side / 10) / 20;
    const inkAt = (i, j) => (i >= 0 && j >= 0 && i < side && j < side ? grey[j * side + i] : 0);
    const place = (middle, pixel, part) => Math.round(middle + (pixel + (part + 0.5) / 4 - SIDE / 2) * scale);
    return Float64Array.from({ length: SIDE ** 2 }, (_, i) => {
      let sum = 0;
      for (let part = 0; part < 16; part++) {
        sum += inkAt(place(x, i % SIDE, part % 4), place(y, Math.floor(i / SIDE), Math.floor(part / 4)));
      }
      return sum / 16;
    });
  }

  return { SIDE, OUTCOMES, read, logits, climb, answer, outcome, attack, prepare };
})();
