/* The forward pass of model.py in plain JavaScript: the same names in the same order.

   Letters as there: N tokens, D embed_dim, h heads, d = D / h. Arrays are row-major Float32Arrays.
   Parts that only training needs, such as dropout, are omitted. `changes` comes from "Break it":
     keep           patches that are not removed, or null for all
     order          which patch's pixels each place shows, or null
     no_pos_embed   leave out the position embeddings
     no_scale       leave out the factor 1 / sqrt(d)
     silent         a Set of blocks "b" and heads "b.h" that add nothing
   `record`, if given, receives intermediate values of every block. */

const NO_CHANGES = {
  keep: null, order: null, no_pos_embed: false, no_scale: false, silent: new Set(),
};

class Linear {  // y = x W^T + b
  constructor(weights, name) {
    this.weight = weights[`${name}.weight`];
    this.bias = weights[`${name}.bias`];  // undefined for qkv if qkv_bias is false
    this.out_features = weights.shapes[`${name}.weight`][0];
    this.in_features = this.weight.length / this.out_features;
  }
  forward(x) {  // (N, in) -> (N, out)
    const { weight, bias, in_features: I, out_features: O } = this;
    const N = x.length / I, y = new Float32Array(N * O);
    for (let o = 0; o < O; o++) {
      const w = o * I, b = bias ? bias[o] : 0;
      let n = 0;
      for (; n + 4 <= N; n += 4) {  // four tokens at once, so that each weight is read once for all
        let s0 = b, s1 = b, s2 = b, s3 = b;
        const x0 = n * I, x1 = x0 + I, x2 = x1 + I, x3 = x2 + I;
        for (let i = 0; i < I; i++) {
          const v = weight[w + i];
          s0 += v * x[x0 + i]; s1 += v * x[x1 + i]; s2 += v * x[x2 + i]; s3 += v * x[x3 + i];
        }
        y[n * O + o] = s0; y[(n + 1) * O + o] = s1;
        y[(n + 2) * O + o] = s2; y[(n + 3) * O + o] = s3;
      }
      for (; n < N; n++) {
        let sum = b;
        for (let i = 0; i < I; i++) sum += weight[w + i] * x[n * I + i];
        y[n * O + o] = sum;
      }
    }
    return y;
  }
}

class LayerNorm {
  constructor(weights, name, eps) {
    Object.assign(this, { weight: weights[`${name}.weight`], bias: weights[`${name}.bias`], eps });
  }
  forward(x) {  // (N, D) -> (N, D)
    const D = this.weight.length, y = new Float32Array(x.length);
    for (let at = 0; at < x.length; at += D) {
      let mean = 0, variance = 0;
      for (let i = 0; i < D; i++) mean += x[at + i] / D;
      for (let i = 0; i < D; i++) variance += (x[at + i] - mean) ** 2 / D;
      const inverse = 1 / Math.sqrt(variance + this.eps);
      for (let i = 0; i < D; i++) {
        y[at + i] = (x[at + i] - mean) * inverse * this.weight[i] + this.bias[i];
      }
    }
    return y;
  }
}

function softmax(row) {  // in place
  let high = -Infinity, sum = 0;
  for (let i = 0; i < row.length; i++) high = Math.max(high, row[i]);
  for (let i = 0; i < row.length; i++) sum += row[i] = Math.exp(row[i] - high);
  for (let i = 0; i < row.length; i++) row[i] /= sum;
  return row;
}

function gelu(x) {  // in place; x * Phi(x), with the error function of Abramowitz and Stegun 7.1.26
  for (let i = 0; i < x.length; i++) {
    const z = Math.abs(x[i]) * Math.SQRT1_2, t = 1 / (1 + 0.3275911 * z);
    const inner = 1.421413741 + t * (-1.453152027 + t * 1.061405429);
    const tail = t * (0.254829592 + t * (-0.284496736 + t * inner));
    const erf = 1 - tail * Math.exp(-z * z);
    x[i] *= 0.5 * (1 + (x[i] < 0 ? -erf : erf));
  }
  return x;
}

class PatchEmbed {
  constructor(weights, config) {
    this.config = config;
    this.proj = new Linear(weights, "patch_embed.proj");  // the convolution as (D, C * P * P)
  }
  patches(image, order) {  // (C, H, W) -> (N, C * P * P), patches row by row
    const { in_chans: C, patch_size: P, img_size: S } = this.config, side = S / P;
    const x = new Float32Array(image.length);
    for (let n = 0, at = 0; n < side * side; n++) {
      const place = order ? order[n] : n;
      const top = Math.floor(place / side) * P, left = (place % side) * P;
      for (let c = 0; c < C; c++)
        for (let row = 0; row < P; row++, at += P) {
          const start = (c * S + top + row) * S + left;
          x.set(image.subarray(start, start + P), at);
        }
    }
    return x;
  }
  forward(image, order) { return this.proj.forward(this.patches(image, order)); }  // (N, D)
}

class Attention {
  constructor(weights, name, config) {
    this.num_heads = config.num_heads;
    this.scale = (config.embed_dim / config.num_heads) ** -0.5;
    this.qkv = new Linear(weights, `${name}.qkv`);
    this.proj = new Linear(weights, `${name}.proj`);
  }
  forward(x, changes, isSilent, record) {  // (N, D) -> (N, D)
    const D = this.proj.in_features, N = x.length / D, h = this.num_heads, d = D / h;
    const qkv = this.qkv.forward(x);  // (N, 3, h, d)
    const weights = new Float32Array(h * N * N), scores = new Float32Array(h * N * N);
    const scale = changes.no_scale ? 1 : this.scale, out = new Float32Array(N * D);
    for (let head = 0; head < h; head++) {
      for (let i = 0; i < N; i++) {
        const q = i * 3 * D + head * d, at = (head * N + i) * N, row = weights.subarray(at, at + N);
        for (let j = 0; j < N; j++) {
          const k = j * 3 * D + D + head * d;
          let sum = 0;
          for (let c = 0; c < d; c++) sum += qkv[q + c] * qkv[k + c];
          scores[at + j] = sum;
          row[j] = sum * scale;
        }
        softmax(row);
        if (isSilent(head)) continue;
        for (let j = 0; j < N; j++) {
          const v = j * 3 * D + 2 * D + head * d;
          for (let c = 0; c < d; c++) out[i * D + head * d + c] += row[j] * qkv[v + c];
        }
      }
    }
    if (record) Object.assign(record, { qkv, scores, weights });
    return this.proj.forward(out);
  }
}

class MLP {
  constructor(weights, name) {
    this.fc1 = new Linear(weights, `${name}.fc1`);
    this.fc2 = new Linear(weights, `${name}.fc2`);
  }
  forward(x) { return this.fc2.forward(gelu(this.fc1.forward(x))); }
}

class LayerScale {
  constructor(weights, name) { this.gamma = weights[`${name}.gamma`]; }  // undefined: the identity
  forward(x) {
    const { gamma } = this;
    return gamma ? x.map((value, i) => value * gamma[i % gamma.length]) : x;
  }
}

class Block {
  constructor(weights, index, config) {
    const name = `blocks.${index}`;
    this.index = index;
    this.norm1 = new LayerNorm(weights, `${name}.norm1`, config.norm_eps);
    this.attn = new Attention(weights, `${name}.attn`, config);
    this.ls1 = new LayerScale(weights, `${name}.ls1`);
    this.norm2 = new LayerNorm(weights, `${name}.norm2`, config.norm_eps);
    this.mlp = new MLP(weights, `${name}.mlp`);
    this.ls2 = new LayerScale(weights, `${name}.ls2`);
  }
  forward(x, changes, record) {  // (N, D) -> (N, D)
    if (changes.silent.has(`${this.index}`)) return x;
    const isSilent = (head) => changes.silent.has(`${this.index}.${head}`);
    const attended = this.attn.forward(this.norm1.forward(x), changes, isSilent, record);
    x = add(x, this.ls1.forward(attended));
    return add(x, this.ls2.forward(this.mlp.forward(this.norm2.forward(x))));
  }
}

function add(x, y) { return x.map((value, i) => value + y[i]); }

class VisionTransformer {
  constructor(config, weights) {
    Object.assign(this, config);
    this.patch_embed = new PatchEmbed(weights, config);
    this.cls_token = weights.cls_token;  // undefined without a class token
    this.num_prefix_tokens = this.cls_token ? 1 : 0;
    this.positions = weights.pos_embed;
    this.blocks = Array.from({ length: config.depth }, (_, i) => new Block(weights, i, config));
    const identity = { forward: (x) => x }, avg = config.global_pool === "avg";
    this.norm = avg ? identity : new LayerNorm(weights, "norm", config.norm_eps);
    this.fc_norm = avg ? new LayerNorm(weights, "fc_norm", config.norm_eps) : identity;
    this.head = new Linear(weights, "head");
  }
  embed(image, changes) {  // (C, H, W) -> (N, D)
    const D = this.embed_dim, withClass = this.num_prefix_tokens && !this.no_embed_class;
    const patches = this.patch_embed.forward(image, changes.order);
    const kept = changes.keep ?? Array.from({ length: patches.length / D }, (_, n) => n);
    const first = this.num_prefix_tokens, x = new Float32Array((first + kept.length) * D);
    if (this.cls_token) x.set(this.cls_token);
    kept.forEach((n, i) => x.set(patches.subarray(n * D, (n + 1) * D), (first + i) * D));
    if (changes.no_pos_embed) return x;
    const places = kept.map((n) => n + (withClass ? 1 : 0));  // rows of pos_embed
    if (this.num_prefix_tokens) places.unshift(withClass ? 0 : -1);  // -1: no position
    places.forEach((place, n) => {
      for (let i = 0; place >= 0 && i < D; i++) x[n * D + i] += this.positions[place * D + i];
    });
    return x;
  }
  forward_head(x) {  // normalized tokens (N, D) -> logits (classes)
    const D = this.embed_dim, first = this.num_prefix_tokens, N = x.length / D;
    let features = x.subarray(0, D);
    if (this.global_pool === "avg") {
      features = new Float32Array(D);
      for (let n = first; n < N; n++)
        for (let i = 0; i < D; i++) features[i] += x[n * D + i] / (N - first);
    }
    return this.head.forward(this.fc_norm.forward(features));
  }
  forward(image, changes = NO_CHANGES, record = null) {  // normalized image (C, H, W) -> logits
    let x = this.embed(image, changes);
    // the head, too early
    const lens = () => record?.lens.push(this.forward_head(this.norm.forward(x)));
    if (record) Object.assign(record, { tokens: x, blocks: [], lens: [] });
    lens();
    for (const block of this.blocks) {
      const values = record ? {} : null;
      x = block.forward(x, changes, values);
      record?.blocks.push(values);
      lens();
    }
    return this.forward_head(this.norm.forward(x));
  }
}

/* Weights from base64: fp16 numbers, one tensor after the other as `layout` lists them. */
function readWeights(base64, layout) {
  const halves = new DataView(bytes(base64).buffer);
  const weights = { shapes: Object.fromEntries(layout) };
  let at = 0;
  for (const [name, shape] of layout) {
    const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
    for (let i = 0; i < values.length; i++, at += 2) {
      values[i] = halfToFloat(halves.getUint16(at, true));
    }
    weights[name] = values;
  }
  return weights;
}

function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (!exponent) return sign * 2 ** -14 * (fraction / 1024);
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}
