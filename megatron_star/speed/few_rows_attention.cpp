// Attention of few query rows to many keys on a CPU, with its LSE: one pass over keys and values, at the rate
// at which memory gives them. Flash decoding (Dao et al., 2023): the keys of each head are divided into pieces,
// which threads take, and whose results are merged.
//
// HEAD_SIZE (a multiple of 16) and ELEMENT (float, or uint16_t: the bits of bfloat16) are defined before.
// Whatever rows there are, results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int WIDTH = 16;             // floats of a vector
constexpr int BLOCK = 256;            // keys whose scores are held at a time
constexpr int PIECE = 1024;           // keys of a head that a thread takes at a time
constexpr int AHEAD = 8192;           // bytes between what is read and what is fetched for later
constexpr int MOST_ROWS = 64;
constexpr int VECTORS = HEAD_SIZE / WIDTH;
constexpr float HIDDEN = -1e30f;      // the score of no key

struct Strided {  // of one head: consecutive tokens are `stride` elements apart
  const ELEMENT* data;
  int64_t stride;
  const ELEMENT* token(int64_t i) const { return data + i * stride; }
  int64_t ahead() const { return std::max<int64_t>(1, AHEAD / (HEAD_SIZE * sizeof(ELEMENT))); }
};

static inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

static inline Floats load(const uint16_t* from) {
  Halves upper;
  std::memcpy(&upper, from, sizeof upper);
  return (Floats)(__builtin_convertvector(upper, Words) << 16);
}

static inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

static inline float sum_of(Floats values) {
  float sum = 0;
  for (int i = 0; i < WIDTH; i++) sum += values[i];
  return sum;
}

// exp(x) for x <= 0, to two units in the last place (Cephes' polynomial); NaN stays NaN.
static inline Floats exponential(Floats given) {
  Floats x = larger(given, Floats{} - 87.3f);
  Integers power = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
  Floats whole = __builtin_convertvector(power, Floats);
  Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats sum = Floats{} + 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return sum * (Floats)((power + 127) << 23) + given * 0.0f;
}

// Sums over 16 vectors' own values: halves are added up while pairs of vectors become one.
static inline Floats sums_of(Floats* of) {
#define PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    Floats a = of[2 * i], b = of[2 * i + 1];
    of[i] = PAIR(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
            PAIR(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    Floats a = of[2 * i], b = of[2 * i + 1];
    of[i] = PAIR(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
            PAIR(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    Floats a = of[2 * i], b = of[2 * i + 1];
    of[i] = PAIR(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
            PAIR(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  return PAIR(of[0], of[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         PAIR(of[0], of[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#undef PAIR
}

// Scores of one row and 16 keys; the first row of a block fetches later keys.
template <bool FETCHES>
static inline void score(const float* query, const ELEMENT* keys, int64_t stride, int64_t ahead, float* scores) {
  Floats products[WIDTH];
#pragma GCC unroll 16
  for (int j = 0; j < WIDTH; j++) {
    const ELEMENT* key = keys + j * stride;
    if (FETCHES)
      for (size_t byte = 0; byte < HEAD_SIZE * sizeof(ELEMENT); byte += 64)
        __builtin_prefetch((const char*)(key + ahead * stride) + byte);
    Floats sum = load(key) * load(query);
#pragma GCC unroll 16
    for (int c = 1; c < VECTORS; c++) sum += load(key + c * WIDTH) * load(query + c * WIDTH);
    products[j] = sum;
  }
  store(scores, sums_of(products));
}

// Scores [rows, BLOCK] of `num_keys` keys from `first` on; HIDDEN behind them, up to a multiple of 16.
static void score_block(const float* query, int rows, Strided keys, int64_t first, int num_keys, float* scores) {
  int j = 0;
  for (; j + WIDTH <= num_keys; j += WIDTH) {
    const ELEMENT* some = keys.token(first + j);
    score<true>(query, some, keys.stride, keys.ahead(), scores + j);
    for (int i = 1; i < rows; i++)
      score<false>(query + i * HEAD_SIZE, some, keys.stride, 0, scores + i * BLOCK + j);
  }
  if (j == num_keys) return;
  alignas(64) ELEMENT last[WIDTH * HEAD_SIZE] = {};
  for (int k = j; k < num_keys; k++)
    std::memcpy(last + (k - j) * HEAD_SIZE, keys.token(first + k), HEAD_SIZE * sizeof(ELEMENT));
  for (int i = 0; i < rows; i++) {
    score<false>(query + i * HEAD_SIZE, last, HEAD_SIZE, 0, scores + i * BLOCK + j);
    std::fill(scores + i * BLOCK + num_keys, scores + i * BLOCK + j + WIDTH, HIDDEN);
  }
}

// Scores of one row to weights, relative to the largest score so far. Returns by what older sums are scaled.
static float weigh(float* scores, int num_keys, float& largest, float& total) {
  Floats most = load(scores);
  for (int j = WIDTH; j < num_keys; j += WIDTH) most = larger(most, load(scores + j));
  float top = largest;
  for (int j = 0; j < WIDTH; j++) top = std::max(top, most[j]);
  float scale = std::exp(largest - top);
  Floats sum = {};
  for (int j = 0; j < num_keys; j += WIDTH) {
    Floats weights = exponential(load(scores + j) - top);
    store(scores + j, weights);
    sum += weights;
  }
  largest = top;
  total = total * scale + sum_of(sum);
  return scale;
}

// Adds to ROWS rows of results, scaled before, the weighted values of a block: COLUMNS vectors of each.
template <int ROWS, int COLUMNS>
static void add_columns(
    const float* weights, const ELEMENT* values, int64_t stride, int64_t ahead, int num_keys, const float* scales,
    float* out) {
  Floats sums[ROWS][COLUMNS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) sums[i][c] = load(out + i * HEAD_SIZE + c * WIDTH) * scales[i];
  for (int j = 0; j < num_keys; j++) {
    const ELEMENT* value = values + j * stride;
    Floats columns[COLUMNS];
    for (size_t byte = 0; byte < COLUMNS * WIDTH * sizeof(ELEMENT); byte += 64)
      __builtin_prefetch((const char*)(value + ahead * stride) + byte);
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) columns[c] = load(value + c * WIDTH);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) sums[i][c] += columns[c] * weights[i * BLOCK + j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) store(out + i * HEAD_SIZE + c * WIDTH, sums[i][c]);
}

template <int ROWS>
static void add_rows(
    const float* weights, Strided values, int64_t first, int num_keys, const float* scales, float* out) {
  constexpr int AT_ONCE = 4, LEFT = VECTORS % AT_ONCE;
  const ELEMENT* some = values.token(first);
  int c = 0;
  for (; c + AT_ONCE <= VECTORS; c += AT_ONCE)
    add_columns<ROWS, AT_ONCE>(
        weights, some + c * WIDTH, values.stride, values.ahead(), num_keys, scales, out + c * WIDTH);
  if (LEFT > 0)
    add_columns<ROWS, (LEFT > 0 ? LEFT : 1)>(
        weights, some + c * WIDTH, values.stride, values.ahead(), num_keys, scales, out + c * WIDTH);
}

// The results of a piece of one head: sums [rows, HEAD_SIZE] of weighted values, the largest score of each
// row, and the sum of its weights.
static void attend_piece(
    const float* query, int rows, Strided keys, Strided values, int64_t first, int64_t end, float* out,
    float* largest, float* totals) {
  alignas(64) float scores[MOST_ROWS * BLOCK];
  float scales[MOST_ROWS];
  std::fill(out, out + rows * HEAD_SIZE, 0.0f);
  std::fill(largest, largest + rows, HIDDEN);
  std::fill(totals, totals + rows, 0.0f);
  for (; first < end; first += BLOCK) {
    int num_keys = std::min<int64_t>(BLOCK, end - first);
    score_block(query, rows, keys, first, num_keys, scores);
    for (int i = 0; i < rows; i++) scales[i] = weigh(scores + i * BLOCK, num_keys, largest[i], totals[i]);
    int i = 0;
    for (; i + 4 <= rows; i += 4)
      add_rows<4>(scores + i * BLOCK, values, first, num_keys, scales + i, out + i * HEAD_SIZE);
    if (rows - i == 3) add_rows<3>(scores + i * BLOCK, values, first, num_keys, scales + i, out + i * HEAD_SIZE);
    if (rows - i == 2) add_rows<2>(scores + i * BLOCK, values, first, num_keys, scales + i, out + i * HEAD_SIZE);
    if (rows - i == 1) add_rows<1>(scores + i * BLOCK, values, first, num_keys, scales + i, out + i * HEAD_SIZE);
  }
}

// query [heads, rows, HEAD_SIZE], scaled; keys and values by strides, in elements, of heads and tokens; to out
// [heads, rows, HEAD_SIZE] and lse [heads, rows].
extern "C" void attend_few_rows(
    const float* query, const ELEMENT* keys, const ELEMENT* values, float* out, float* lse, int64_t heads,
    int64_t rows, int64_t num_keys, int64_t key_head, int64_t key_token, int64_t value_head, int64_t value_token,
    int64_t num_threads) {
  const int64_t pieces = (num_keys + PIECE - 1) / PIECE, items = heads * pieces;
  std::vector<float> sums(items * rows * HEAD_SIZE), largest(items * rows), totals(items * rows);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t item = 0; item < items; item++) {
    int64_t head = item / pieces, piece = item % pieces;
    attend_piece(
        query + head * rows * HEAD_SIZE, rows, {keys + head * key_head, key_token},
        {values + head * value_head, value_token}, num_keys * piece / pieces, num_keys * (piece + 1) / pieces,
        &sums[item * rows * HEAD_SIZE], &largest[item * rows], &totals[item * rows]);
  }
  for (int64_t row = 0; row < heads * rows; row++) {
    int64_t first = row / rows * pieces * rows + row % rows;  // its place in the head's first piece
    float top = largest[first], total = 0;
    for (int64_t piece = 1; piece < pieces; piece++) top = std::max(top, largest[first + piece * rows]);
    float* merged = out + row * HEAD_SIZE;
    std::fill(merged, merged + HEAD_SIZE, 0.0f);
    for (int64_t piece = 0; piece < pieces; piece++) {
      int64_t part = first + piece * rows;
      float scale = std::exp(largest[part] - top);
      total += scale * totals[part];
      for (int d = 0; d < HEAD_SIZE; d++) merged[d] += scale * sums[part * HEAD_SIZE + d];
    }
    for (int d = 0; d < HEAD_SIZE; d++) merged[d] /= total;
    lse[row] = top + std::log(total);
  }
}
