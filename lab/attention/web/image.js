/* Converts a drawing or a photo to model input, in the way the dataset was prepared. */

/* Antialiased resize as in Pillow: each output pixel is a weighted mean of all input pixels that
   its filter covers, and the filter widens as the image shrinks. `pixels` is one channel
   (height, width). */
const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight: (x) => {
      const t = Math.abs(x), a = -0.5;
      if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
      return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
    },
  },
};

function resize(pixels, width, height, newWidth, newHeight, filter) {
  const across = filterWeights(width, newWidth, filter);
  const down = filterWeights(height, newHeight, filter);
  const narrow = new Float32Array(height * newWidth);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < newWidth; x++) {
      const { first, weights } = across[x], at = y * width + first;
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += weights[i] * pixels[at + i];
      narrow[y * newWidth + x] = sum;
    }
  }
  const result = new Float32Array(newHeight * newWidth);
  for (let y = 0; y < newHeight; y++) {
    const { first, weights } = down[y];
    for (let i = 0; i < weights.length; i++) {
      const at = (first + i) * newWidth;
      for (let x = 0; x < newWidth; x++) result[y * newWidth + x] += weights[i] * narrow[at + x];
    }
  }
  return result;
}

function filterWeights(size, newSize, { support, weight }) {
  const scale = size / newSize, stretch = Math.max(1, scale), reach = support * stretch;
  return Array.from({ length: newSize }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.round(center - reach));
    const end = Math.min(size, Math.round(center + reach));
    const weights = [];
    for (let j = first; j < end; j++) weights.push(weight((j + 0.5 - center) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((w) => w / sum) };
  });
}

/* A drawing as the dataset would have stored it. `ink` is (side, side) with values from 0 to 255.

   MNIST scaled each digit, with its proportions, into a box of 20 x 20 pixels and moved its center
   of mass to the center of 28 x 28 pixels (LeCun et al. 1998). `rule` is
   { box, center: "mass" or "box" }, or null to keep size and place of the drawing. */
function fitDrawing(ink, side, size, rule) {
  const bounds = rule && inkBounds(ink, side);
  if (!bounds) return resize(ink, side, side, size, size, FILTERS.bilinear);
  const { left, top, width, height } = bounds, scale = rule.box / Math.max(width, height);
  const [newWidth, newHeight] = [width, height].map((n) => Math.max(1, Math.round(n * scale)));
  const cut = new Float32Array(width * height);
  for (let y = 0; y < height; y++) {
    const start = (top + y) * side + left;
    cut.set(ink.subarray(start, start + width), y * width);
  }
  const small = resize(cut, width, height, newWidth, newHeight, FILTERS.bilinear);
  let [x0, y0] = [(size - newWidth) / 2, (size - newHeight) / 2].map(Math.floor);
  if (rule.center === "mass") {
    let mass = 0, x = 0, y = 0;
    small.forEach((value, i) => {
      mass += value; x += value * (i % newWidth); y += value * Math.floor(i / newWidth);
    });
    [x0, y0] = [Math.round(size / 2 - x / mass), Math.round(size / 2 - y / mass)];
  }
  const image = new Float32Array(size * size);
  small.forEach((value, i) => {
    const x = x0 + (i % newWidth), y = y0 + Math.floor(i / newWidth);
    if (x >= 0 && x < size && y >= 0 && y < size) image[y * size + x] = value;
  });
  return image;
}

function inkBounds(ink, side) {
  let left = side, top = side, right = -1, bottom = -1;
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      if (ink[y * side + x] < 32) continue;  // the soft edge of the pen
      left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = y;
    }
  }
  return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

/* A photograph as evaluation sees it: the central square resized to `resized` pixels, of which the
   central `img_size` pixels are kept. `source` is an ImageBitmap. Returns (C, H, W), 0 to 255. */
function cropPhotograph(source, { img_size: S, resized: R, interpolation }, channels) {
  const short = Math.min(source.width, source.height);
  const [width, height] = [source.width, source.height].map((n) => Math.floor((R * n) / short));
  const canvas = new OffscreenCanvas(source.width, source.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";  // as for transparent images in training
  context.fillRect(0, 0, source.width, source.height);
  context.drawImage(source, 0, 0);
  const rgba = context.getImageData(0, 0, source.width, source.height).data;
  const image = new Float32Array(channels * S * S);
  const inner = roundHalfEven((R - S) / 2);
  const [left, top] = [width, height].map((n) => roundHalfEven((n - R) / 2) + inner);
  for (let c = 0; c < channels; c++) {
    const plane = new Float32Array(source.width * source.height);
    for (let i = 0; i < plane.length; i++) plane[i] = rgba[4 * i + c];
    const small = resize(plane, source.width, source.height, width, height, FILTERS[interpolation]);
    for (let y = 0; y < S; y++) {
      for (let x = 0; x < S; x++) {
        const value = small[(top + y) * width + left + x];
        image[(c * S + y) * S + x] = Math.min(255, Math.max(0, Math.round(value)));
      }
    }
  }
  return image;
}

function roundHalfEven(x) {  // as Python rounds
  return x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

/* Pixels (C, H, W) from 0 to 255 to the input of the model. */
function normalize(image, { mean, std }) {
  const area = image.length / mean.length;
  return image.map((value, i) => {
    const channel = Math.floor(i / area);
    return (value / 255 - mean[channel]) / std[channel];
  });
}

function toImageData(image, size, channels) {
  const data = new ImageData(size, size), area = size * size;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = image[(channels === 3 ? c * area : 0) + i];
    data.data[4 * i + 3] = 255;
  }
  return data;
}
