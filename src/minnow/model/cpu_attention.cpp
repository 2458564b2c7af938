// The blocks of cpu_attention.py in one piece of C++, for bf16: scores never leave the caches, and stay float32 until
// they are probabilities. As in flash attention (2205.14135) the forward pass keeps the logarithm of each softmax's
// denominator, from which the backward pass has the probabilities again.
//
// A block of scores is held transposed, [keys, queries]: the largest score of a query, the sum of its probabilities and
// its delta then lie across the vector lanes, and no sum runs along them. Products are torch's `brgemm`, bf16 in and
// float32 out. Its right operand has the rows of its sum in pairs ("VNNI"): [K / 2, N, 2], here numbers of 32 bits.
//
// B sequences of T tokens, H query heads, K key heads, heads of size d: [B, T, H, d], contiguous.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

using at::BFloat16;

namespace {

#ifdef PLAIN_PRODUCTS  // for tests on processors for which torch has no brgemm
void brgemm(int64_t M, int64_t N, int64_t K, int64_t stride_a, int64_t stride_b, int64_t stride_c, bool add,
            const BFloat16* a, const BFloat16* b, float* c) {
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      float sum = add ? c[m * stride_c + n] : 0.0f;
      for (int64_t k = 0; k < K; ++k) sum += float(a[m * stride_a + k]) * float(b[(k / 2 * stride_b + n) * 2 + k % 2]);
      c[m * stride_c + n] = sum;
    }
}
void release() {}
#else
using at::native::cpublas::brgemm;
void release() { at::native::cpublas::brgemm_release(); }
#endif

constexpr int64_t QUERIES = 128, ROWS = 256, KEYS = 128;
constexpr float LOG2_E = 1.44269504088896f;

// Rounds to nearest, ties away from zero.
inline uint32_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x8000) >> 16;
}

inline float from_bf16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// 2^x for x <= 0 to within 4e-6 of itself, 0 below 2^-126: the whole part of x goes into the exponent, 2 to the power
// of the rest is a polynomial (fitted for the smallest largest error on [-1/2, 1/2]).
inline float exp2_of_negative(float x) {
  float whole = std::nearbyintf(x), t = x - whole;
  float y = 0.999999261f + t * (0.693121815f + t * (0.240247448f + t * (0.055917860f + t * 0.009570101f)));
  int32_t bits;
  std::memcpy(&bits, &y, 4);
  bits += static_cast<int32_t>(whole) << 23;
  std::memcpy(&y, &bits, 4);
  return x < -126.0f ? 0.0f : y;
}

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// Exchanges the upper right and the lower left quarter of every square of 2 S rows and columns.
template <int S>
inline void exchange_quarters(Bits* rows) {
  for (int i = 0; i < 16; ++i) {
    if (i & S) continue;
    Bits upper = rows[i], lower = rows[i + S];
#ifdef __clang__
    for (int r = 0; r < 16; ++r) {
      rows[i][r] = r & S ? lower[r - S] : upper[r];
      rows[i + S][r] = r & S ? lower[r] : upper[r + S];
    }
#else
    Bits left, right;
    for (uint32_t r = 0; r < 16; ++r) {
      left[r] = r & S ? 16 + r - S : r;
      right[r] = r & S ? 16 + r : r + S;
    }
    rows[i] = __builtin_shuffle(upper, lower, left);
    rows[i + S] = __builtin_shuffle(upper, lower, right);
#endif
  }
}

inline void transpose_16_by_16(Bits* rows) {
  exchange_quarters<8>(rows);
  exchange_quarters<4>(rows);
  exchange_quarters<2>(rows);
  exchange_quarters<1>(rows);
}

// out[c, r] = x[r, c] of numbers of 32 bits. `row` gives the address of row r, none for a row of zeros; `columns` and
// `rows` may be any number, what is beyond multiples of 16 goes one by one.
template <typename Row>
inline void transpose_32_bits(Row row, int64_t rows, int64_t columns, uint32_t* out, int64_t out_stride) {
  Bits tile[16];
  int64_t r = 0;
  for (; r + 16 <= rows; r += 16) {
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16) {
      for (int i = 0; i < 16; ++i) {
        const uint32_t* from = row(r + i);
        if (from)
          std::memcpy(&tile[i], from + c, sizeof tile[i]);
        else
          tile[i] = Bits{};
      }
      transpose_16_by_16(tile);
      for (int i = 0; i < 16; ++i) std::memcpy(out + (c + i) * out_stride + r, &tile[i], sizeof tile[i]);
    }
    for (; c < columns; ++c)
      for (int i = 0; i < 16; ++i) out[c * out_stride + r + i] = row(r + i) ? row(r + i)[c] : 0;
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = row(r) ? row(r)[c] : 0;
}

// Some rows of one head, `stride` numbers apart.
struct Rows {
  const uint16_t* data;
  int64_t stride, count, dim;

  const uint16_t* row(int64_t i) const { return data + i * stride; }

  // The transpose as a right operand, [dim / 2, width] pairs: columns beyond the last row are zeros.
  void pack_transposed(uint32_t* out, int64_t width, int64_t out_stride) const {
    auto pairs = [&](int64_t r) { return r < count ? reinterpret_cast<const uint32_t*>(row(r)) : nullptr; };
    transpose_32_bits(pairs, width, dim / 2, out, out_stride);
  }

  // As a right operand, [height / 2, dim] pairs: rows beyond the last one are zeros.
  void pack(uint32_t* out, int64_t height) const {
    for (int64_t r = 0; r < height; r += 2) {
      const uint16_t *low = row(r), *high = row(r + 1);
      uint32_t* pairs = out + r / 2 * dim;
      if (r + 1 < count) {
        for (int64_t c = 0; c < dim; ++c) pairs[c] = low[c] | static_cast<uint32_t>(high[c]) << 16;
      } else {
        for (int64_t c = 0; c < dim; ++c) pairs[c] = r < count ? low[c] : 0;
      }
    }
  }

  // The transpose as a left operand, [dim, width] (an even one): columns beyond the last row are zeros.
  void transpose(uint16_t* out, int64_t width) const {
    constexpr int64_t SOME = 32;  // two rows in one row of pairs
    std::vector<uint32_t> pairs(SOME / 2 * dim);
    for (int64_t first = 0; first < width; first += SOME) {
      int64_t height = std::min(SOME, width - first);
      Rows{row(first), stride, std::min(height, count - first), dim}.pack(pairs.data(), height);
      auto pair = [&](int64_t r) { return pairs.data() + r * dim; };
      transpose_32_bits(pair, height / 2, dim, reinterpret_cast<uint32_t*>(out + first), width / 2);
    }
  }
};

struct Shape {
  int64_t B, T, H, K, d;
  int64_t group() const { return H / K; }
  // Queries at a time of each head of a group, and the rows that they are, one head after the other.
  int64_t queries() const {
    return std::min(std::clamp<int64_t>(ROWS / group() / 16 * 16, 16, QUERIES), (T + 15) / 16 * 16);
  }
  int64_t width() const { return queries() * group(); }
  int64_t even_length() const { return (T + 1) / 2 * 2; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(d)); }
  float scale_to_log2() const { return scale() * LOG2_E; }

  // Tokens [first, first + count) of head number `head` of `heads` in sequence b.
  Rows rows(const uint16_t* x, int64_t b, int64_t head, int64_t heads, int64_t first, int64_t count) const {
    return {x + ((b * T + first) * heads + head) * d, heads * d, count, d};
  }
};

const BFloat16* bf16(const void* x) { return static_cast<const BFloat16*>(x); }

// q k of a block, [keys, width]; of the future minus infinity.
void block_of_scores(const Shape& s, const Rows& keys, const uint32_t* queries, int64_t query, int64_t key,
                     float* scores) {
  int64_t width = s.width();
  brgemm(keys.count, width, s.d, keys.stride, width, width, false, bf16(keys.data), bf16(queries), scores);
  for (int64_t e = 0; e < keys.count; ++e) {
    float* row = scores + e * width;
    int64_t future = std::clamp<int64_t>(key + e - query, 0, s.queries());  // queries before this do not see the key
    for (int64_t first = 0; first < width && future; first += s.queries())
      for (int64_t r = 0; r < future; ++r) row[first + r] = -std::numeric_limits<float>::infinity();
  }
}

// out[r, :] = x[:, r] * by[r] as bf16, x [d, at least as many as out's rows].
void write_transposed(const float* x, int64_t stride, const float* by, const Rows& out) {
  std::vector<float> transposed(out.count * out.dim);
  auto row = [&](int64_t c) { return reinterpret_cast<const uint32_t*>(x + c * stride); };
  transpose_32_bits(row, out.dim, out.count, reinterpret_cast<uint32_t*>(transposed.data()), out.dim);
  for (int64_t r = 0; r < out.count; ++r) {
    auto to = const_cast<uint16_t*>(out.row(r));
    for (int64_t c = 0; c < out.dim; ++c) to[c] = to_bf16(transposed[r * out.dim + c] * by[r]);
  }
}

void forward_key_head(const Shape& s, int64_t b, int64_t head, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                      uint16_t* out, float* lse) {
  int64_t width = s.width(), even = s.even_length(), first_head = head * s.group();
  float scale = s.scale_to_log2();
  std::vector<uint16_t> values(s.d * even);
  s.rows(v, b, head, s.K, 0, s.T).transpose(values.data(), even);
  std::vector<uint32_t> queries(s.d / 2 * width), probabilities(KEYS / 2 * width);
  std::vector<float> scores(KEYS * width), sums(s.d * width), largest(width), total(width), shrink(width);
  for (int64_t query = 0; query < s.T; query += s.queries()) {
    int64_t count = std::min(s.queries(), s.T - query);
    for (int64_t g = 0; g < s.group(); ++g)
      s.rows(q, b, first_head + g, s.H, query, count)
          .pack_transposed(queries.data() + g * s.queries(), s.queries(), width);
    std::fill(largest.begin(), largest.end(), -1e30f);
    std::fill(total.begin(), total.end(), 0.0f);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t key = 0; key < query + count; key += KEYS) {
      int64_t num_keys = std::min(KEYS, query + count - key);
      block_of_scores(s, s.rows(k, b, head, s.K, key, num_keys), queries.data(), query, key, scores.data());
      std::copy(largest.begin(), largest.end(), shrink.begin());
      for (int64_t e = 0; e < num_keys; ++e)
        for (int64_t r = 0; r < width; ++r) largest[r] = std::max(largest[r], scores[e * width + r]);
      for (int64_t r = 0; r < width; ++r) {
        shrink[r] = exp2_of_negative((shrink[r] - largest[r]) * scale);
        total[r] *= shrink[r];
      }
      for (int64_t e = 0; e < num_keys; e += 2) {
        const float* low = scores.data() + e * width;
        bool paired = e + 1 < num_keys;
        uint32_t* pairs = probabilities.data() + e / 2 * width;
        for (int64_t r = 0; r < width; ++r) {
          float first = exp2_of_negative((low[r] - largest[r]) * scale);
          float second = paired ? exp2_of_negative((low[r + width] - largest[r]) * scale) : 0.0f;
          total[r] += first + second;
          pairs[r] = to_bf16(first) | to_bf16(second) << 16;
        }
      }
      for (int64_t c = 0; c < s.d; ++c)
        for (int64_t r = 0; r < width; ++r) sums[c * width + r] *= shrink[r];
      brgemm(s.d, width, (num_keys + 1) / 2 * 2, even, width, width, true, bf16(values.data() + key),
             bf16(probabilities.data()), sums.data());
    }
    for (int64_t g = 0; g < s.group(); ++g) {
      int64_t first = g * s.queries(), h = first_head + g;
      for (int64_t r = first; r < first + count; ++r) {
        lse[(b * s.H + h) * s.T + query + r - first] = largest[r] * scale + std::log2(total[r]);
        total[r] = 1.0f / total[r];
      }
      write_transposed(sums.data() + first, width, total.data() + first, s.rows(out, b, h, s.H, query, count));
    }
  }
}

void backward_key_head(const Shape& s, int64_t b, int64_t head, const uint16_t* grad, const uint16_t* q,
                       const uint16_t* k, const uint16_t* v, const uint16_t* out, const float* lse, uint16_t* grad_q,
                       uint16_t* grad_k, uint16_t* grad_v) {
  int64_t width = s.width(), even = s.even_length();
  float scale = s.scale_to_log2();
  std::vector<uint16_t> keys(s.d * even), probabilities(KEYS * width), dscores(KEYS * width);
  s.rows(k, b, head, s.K, 0, s.T).transpose(keys.data(), even);
  std::vector<uint32_t> queries(s.d / 2 * width), queries_T(s.d / 2 * width), grads(s.d / 2 * width),
      grads_T(s.d / 2 * width), dscores_paired(KEYS / 2 * width);
  std::vector<float> scores(KEYS * width), dprobabilities(KEYS * width), sums(s.d * width), delta(width), log_sum(width),
      scales(std::max(width, s.T), s.scale());
  std::vector<float> sums_k(s.T * s.d, 0.0f), sums_v(s.T * s.d, 0.0f);
  for (int64_t query = 0; query < s.T; query += s.queries()) {
    int64_t count = std::min(s.queries(), s.T - query);
    for (int64_t g = 0; g < s.group(); ++g) {
      int64_t h = head * s.group() + g, first = g * s.queries();
      Rows q_rows = s.rows(q, b, h, s.H, query, count), grad_rows = s.rows(grad, b, h, s.H, query, count),
           out_rows = s.rows(out, b, h, s.H, query, count);
      q_rows.pack(queries.data() + first / 2 * s.d, s.queries());
      q_rows.pack_transposed(queries_T.data() + first, s.queries(), width);
      grad_rows.pack(grads.data() + first / 2 * s.d, s.queries());
      grad_rows.pack_transposed(grads_T.data() + first, s.queries(), width);
      for (int64_t r = 0; r < s.queries(); ++r) {
        float sum = 0.0f;
        if (r < count)
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < s.d; ++c) sum += from_bf16(out_rows.row(r)[c]) * from_bf16(grad_rows.row(r)[c]);
        delta[first + r] = sum;
        // A query beyond the last one is zeros and sees all with probability zero.
        log_sum[first + r] = r < count ? lse[(b * s.H + h) * s.T + query + r] : 1e30f;
      }
    }
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t key = 0; key < query + count; key += KEYS) {
      int64_t num_keys = std::min(KEYS, query + count - key), even_keys = (num_keys + 1) / 2 * 2;
      Rows v_rows = s.rows(v, b, head, s.K, key, num_keys);
      block_of_scores(s, s.rows(k, b, head, s.K, key, num_keys), queries_T.data(), query, key, scores.data());
      brgemm(num_keys, width, s.d, v_rows.stride, width, width, false, bf16(v_rows.data), bf16(grads_T.data()),
             dprobabilities.data());
      for (int64_t e = 0; e < num_keys; e += 2) {
        const float *score = scores.data() + e * width, *dprobability = dprobabilities.data() + e * width;
        uint16_t *probability = probabilities.data() + e * width, *dscore = dscores.data() + e * width;
        uint32_t* pairs = dscores_paired.data() + e / 2 * width;
        int64_t next = e + 1 < num_keys ? width : 0;  // the last key, if there is none to pair it with, twice
        for (int64_t r = 0; r < width; ++r) {
          float low = exp2_of_negative(score[r] * scale - log_sum[r]);
          float high = exp2_of_negative(score[r + next] * scale - log_sum[r]);
          uint32_t dlow = to_bf16(low * (dprobability[r] - delta[r]));
          uint32_t dhigh = to_bf16(high * (dprobability[r + next] - delta[r]));
          probability[r] = to_bf16(low);
          probability[r + width] = to_bf16(high);
          dscore[r] = dlow;
          dscore[r + width] = dhigh;
          pairs[r] = dlow | dhigh << 16;
        }
      }
      brgemm(num_keys, s.d, width, width, s.d, s.d, true, bf16(probabilities.data()), bf16(grads.data()),
             sums_v.data() + key * s.d);
      brgemm(num_keys, s.d, width, width, s.d, s.d, true, bf16(dscores.data()), bf16(queries.data()),
             sums_k.data() + key * s.d);
      brgemm(s.d, width, even_keys, even, width, width, true, bf16(keys.data() + key), bf16(dscores_paired.data()),
             sums.data());
    }
    for (int64_t g = 0; g < s.group(); ++g)
      write_transposed(sums.data() + g * s.queries(), width, scales.data(),
                       s.rows(grad_q, b, head * s.group() + g, s.H, query, count));
  }
  Rows k_rows = s.rows(grad_k, b, head, s.K, 0, s.T), v_rows = s.rows(grad_v, b, head, s.K, 0, s.T);
  for (int64_t t = 0; t < s.T; ++t) {
    auto k_row = const_cast<uint16_t*>(k_rows.row(t)), v_row = const_cast<uint16_t*>(v_rows.row(t));
    for (int64_t c = 0; c < s.d; ++c) {
      k_row[c] = to_bf16(sums_k[t * s.d + c] * s.scale());
      v_row[c] = to_bf16(sums_v[t * s.d + c]);
    }
  }
}

// Of `count` rows of 16 numbers, `stride` apart: 2 to the power of (what is less than the largest) * scale, and 1 / the
// sums. Largest and sums are those of all numbers whose place in the row is the same modulo `period`.
void softmax_of_16(float* x, int64_t stride, int64_t count, int period, float scale, float* inverse_sums) {
  Floats largest = {}, sums = {}, row;
  largest -= 1e30f;
  for (int64_t t = 0; t < count; ++t) {
    std::memcpy(&row, x + t * stride, sizeof row);
    largest = row > largest ? row : largest;
  }
  for (int r = period; r < 16; ++r) largest[r % period] = std::max(largest[r % period], largest[r]);
  for (int r = period; r < 16; ++r) largest[r] = largest[r % period];
  for (int64_t t = 0; t < count; ++t)
    for (int r = 0; r < 16; ++r) x[t * stride + r] = exp2_of_negative((x[t * stride + r] - largest[r]) * scale);
  for (int64_t t = 0; t < count; ++t) {
    std::memcpy(&row, x + t * stride, sizeof row);
    sums += row;
  }
  for (int r = period; r < 16; ++r) sums[r % period] += sums[r];
  sums = 1.0f / sums;
  std::memcpy(inverse_sums, &sums, sizeof sums);
}

// out[g, c] = sum over t of weights[t, g] x[t, c] * by[g] for G heads and N times 16 numbers, sums in registers.
template <int G, int N>
void weighted_sums(const float* weights, int64_t width, const Rows& x, const float* by, uint16_t* out) {
  Floats sums[G][N] = {};
  for (int64_t t = 0; t < x.count; ++t) {
    for (int n = 0; n < N; ++n) {
      Halves halves;
      std::memcpy(&halves, x.row(t) + 16 * n, sizeof halves);
      auto values = (Floats)(__builtin_convertvector(halves, Bits) << 16);
      for (int g = 0; g < G; ++g) sums[g][n] += weights[t * width + g] * values;
    }
  }
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < N * 16; ++c) out[g * x.dim + c] = to_bf16(sums[g][c / 16][c % 16] * by[g]);
}

// One new token of sequence b for the query heads of one key head. Keys and values of the sequence [B, L, K, d] stand
// at its first `length` places, the last of which is the new token's. The last block of keys may reach behind, where
// numbers stand that get no weight. d is a multiple of 16.
void decode_key_head(const Shape& s, int64_t L, int64_t b, int64_t head, int64_t length, const uint16_t* q,
                     const uint16_t* k, const uint16_t* v, uint16_t* out, std::vector<float>& scores) {
  constexpr int64_t BLOCK = 64;
  int64_t group = s.group(), width = (group + 15) / 16 * 16, stride = s.K * s.d, first = (b * s.H + head * group) * s.d;
  float scale = s.scale_to_log2();
  std::vector<uint32_t> queries(s.d / 2 * width);
  std::vector<float> inverse_sums(width);
  scores.resize((length + BLOCK) * width);
  Rows{q + first, s.d, group, s.d}.pack_transposed(queries.data(), width, width);
  for (int64_t t = 0; t < length; t += BLOCK)
    brgemm(std::min(BLOCK, L - t), width, s.d, stride, width, width, false, bf16(k + (b * L + t) * stride + head * s.d),
           bf16(queries.data()), scores.data() + t * width);
  // Columns that belong to no head go, where what is left of several keys fits into one row of vector lanes.
  int64_t columns = 16 % group == 0 ? group : width;
  if (columns < 16) {
    for (int64_t t = 1; t < length; ++t) std::memcpy(&scores[t * columns], &scores[t * width], columns * sizeof(float));
    int64_t rows = (length * columns + 15) / 16;
    std::fill(&scores[length * columns], &scores[rows * 16], -std::numeric_limits<float>::infinity());
    softmax_of_16(scores.data(), 16, rows, columns, scale, inverse_sums.data());
  } else {
    for (int64_t r = 0; r < columns; r += 16)
      softmax_of_16(&scores[r], columns, length, 16, scale, &inverse_sums[r]);
  }
  for (int64_t c = 0; c < s.d;) {
    Rows values{v + b * L * stride + head * s.d + c, stride, length, s.d};
    bool wide = s.d - c >= 64;
    for (int64_t g = 0; g < group;) {
      bool four = group - g >= 4;
      auto sum = four ? (wide ? weighted_sums<4, 4> : weighted_sums<4, 1>)
                      : (wide ? weighted_sums<1, 4> : weighted_sums<1, 1>);
      sum(scores.data() + g, columns, values, inverse_sums.data() + g, out + first + g * s.d + c);
      g += four ? 4 : 1;
    }
    c += wide ? 64 : 16;
  }
}

}  // namespace

// Whether torch multiplies bf16 blocks on this processor.
extern "C" bool available() {
  try {
    BFloat16 zeros[4] = {};
    float out[1];
    brgemm(1, 1, 2, 2, 1, 1, false, zeros, zeros, out);
    return true;
  } catch (...) {
    return false;
  }
}

extern "C" void forward(int64_t B, int64_t T, int64_t H, int64_t K, int64_t d, const uint16_t* q, const uint16_t* k,
                        const uint16_t* v, uint16_t* out, float* lse) {
  Shape s{B, T, H, K, d};
  at::parallel_for(0, B * K, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) forward_key_head(s, i / K, i % K, q, k, v, out, lse);
    release();
  });
}

extern "C" void backward(int64_t B, int64_t T, int64_t H, int64_t K, int64_t d, const uint16_t* grad, const uint16_t* q,
                         const uint16_t* k, const uint16_t* v, const uint16_t* out, const float* lse,
                         uint16_t* grad_q, uint16_t* grad_k, uint16_t* grad_v) {
  Shape s{B, T, H, K, d};
  at::parallel_for(0, B * K, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      backward_key_head(s, i / K, i % K, grad, q, k, v, out, lse, grad_q, grad_k, grad_v);
    release();
  });
}

// q and out [B, H, d], keys and values [at least B, L, K, d], places int64 [B].
extern "C" void decode(int64_t B, int64_t L, int64_t H, int64_t K, int64_t d, const uint16_t* q, const uint16_t* k,
                       const uint16_t* v, const int64_t* places, uint16_t* out) {
  Shape s{B, L, H, K, d};
  at::parallel_for(0, B * K, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t i = begin; i < end; ++i)
      decode_key_head(s, L, i / K, i % K, places[i / K] + 1, q, k, v, out, scores);
    release();
  });
}
