// Few query rows attend to int8 keys and values, which are read once and widened tile by tile, in the cache.
//
// Compiled by quantised_cpu.py. The vectors are GCC's: as wide as the processor has them. Each of
// num_heads * num_chunks tasks leaves a partial result over its chunk of tokens: the sum of weighted values
// [rows, value_size], the highest score [rows] and the sum of the weights [rows].

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16, TILE = 64, ROWS_AT_ONCE = 4, MOST_ROWS = 64, MOST_SIZE = 256;

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef float half __attribute__((vector_size(2 * LANES)));
typedef float quarter __attribute__((vector_size(LANES)));
typedef int32_t places __attribute__((vector_size(LANES)));

inline vector loaded(const float *from) {
    vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline void stored(float *to, vector v) { memcpy(to, &v, sizeof v); }

inline vector all(float value) { return value - vector{}; }

inline quarter quarter_sums(vector v) {
    half halves[2];
    memcpy(halves, &v, sizeof v);
    const half h = halves[0] + halves[1];
    quarter quarters[2];
    memcpy(quarters, &h, sizeof h);
    return quarters[0] + quarters[1];
}

// Of four vectors, the sum of each.
inline quarter sums(vector a, vector b, vector c, vector d) {
    const quarter p = quarter_sums(a), q = quarter_sums(b), r = quarter_sums(c), s = quarter_sums(d);
    const quarter pq = __builtin_shuffle(p, q, places{0, 4, 2, 6}) + __builtin_shuffle(p, q, places{1, 5, 3, 7});
    const quarter rs = __builtin_shuffle(r, s, places{0, 4, 2, 6}) + __builtin_shuffle(r, s, places{1, 5, 3, 7});
    return __builtin_shuffle(pq, rs, places{0, 1, 4, 5}) + __builtin_shuffle(pq, rs, places{2, 3, 6, 7});
}

// exp of values up to 0; of those below -87, nearly 0. Cephes' polynomial: relative error 2e-7.
inline vector exponential(vector x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;
    const integers whole = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, integers);
    const vector n = __builtin_convertvector(whole, vector);
    x -= n * 0.693359375f;
    x -= n * -2.12194440e-4f;
    vector p = x * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    const integers bits = (whole + 127) << 23;
    vector power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

void widen(const int8_t *__restrict from, float *__restrict to, int64_t number) {
    for (int64_t i = 0; i < number; i++) to[i] = from[i];
}

// Scores of a tile of keys, without their scales.
template <int ROWS> void score(const float *query, const float *key, int64_t size, float (*scores)[TILE]) {
    for (int token = 0; token < TILE; token += 4) {
        vector products[ROWS][4] = {};
        const float *k = key + token * size;
        for (int64_t i = 0; i < size; i += LANES)
            for (int row = 0; row < ROWS; row++) {
                const vector q = loaded(query + row * size + i);
                for (int t = 0; t < 4; t++) products[row][t] += q * loaded(k + t * size + i);
            }
        for (int row = 0; row < ROWS; row++) {
            const quarter of_four = sums(products[row][0], products[row][1], products[row][2], products[row][3]);
            memcpy(scores[row] + token, &of_four, sizeof of_four);
        }
    }
}

template <int ROWS, int VECTORS>
void add_vectors(const float (*weights)[TILE], const float *value, int64_t size, float *out) {
    vector sum[ROWS][VECTORS];
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < VECTORS; i++) sum[row][i] = loaded(out + row * size + i * LANES);
    for (int token = 0; token < TILE; token++)
        for (int i = 0; i < VECTORS; i++) {
            const vector v = loaded(value + token * size + i * LANES);
            for (int row = 0; row < ROWS; row++) sum[row][i] += v * weights[row][token];
        }
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < VECTORS; i++) stored(out + row * size + i * LANES, sum[row][i]);
}

// Add a tile of values, weighted.
template <int ROWS> void add(const float (*weights)[TILE], const float *value, int64_t size, float *out) {
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) add_vectors<ROWS, 4>(weights, value + i, size, out + i);
    for (; i < size; i += LANES) add_vectors<ROWS, 1>(weights, value + i, size, out + i);
}

// Scores to weights, which have the scales of the values; what is summed so far goes on from a new maximum.
void weigh(float *scores, const float *key_scale, const float *value_scale, int number, float *out, int64_t size,
           float *highest, float *total) {
    float most = *highest;
    for (int token = 0; token < number; token++) {
        scores[token] *= key_scale[token];
        most = scores[token] > most ? scores[token] : most;
    }
    const float less = *highest == most ? 1.0f : expf(*highest - most);
    *highest = most;
    vector sum = {};
    for (int token = 0; token < TILE; token += LANES) {
        const vector w = exponential(loaded(scores + token) - most);
        stored(scores + token, w);
    }
    for (int token = number; token < TILE; token++) scores[token] = 0;
    for (int token = 0; token < TILE; token += LANES) sum += loaded(scores + token);
    const quarter of_lanes = quarter_sums(sum);
    *total = *total * less + (of_lanes[0] + of_lanes[1]) + (of_lanes[2] + of_lanes[3]);
    for (int token = 0; token < number; token++) scores[token] *= value_scale[token];
    if (less != 1.0f)
        for (int64_t i = 0; i < size; i++) out[i] *= less;
}

struct Chunk {
    const float *query;
    const int8_t *key, *value;
    const float *key_scale, *value_scale;
    int64_t num_rows, num_tokens, key_size, value_size;
    float *out, *highest, *total;
};

#define OF_ROWS(function, ...)                                                                                    \
    switch (c.num_rows - row) {                                                                                   \
    case 1: function<1>(__VA_ARGS__); break;                                                                      \
    case 2: function<2>(__VA_ARGS__); break;                                                                      \
    case 3: function<3>(__VA_ARGS__); break;                                                                      \
    default: function<ROWS_AT_ONCE>(__VA_ARGS__);                                                                 \
    }

void attend_to(const Chunk &c) {
    alignas(64) float tile[TILE * MOST_SIZE], scores[MOST_ROWS][TILE];
    memset(c.out, 0, c.num_rows * c.value_size * sizeof(float));
    memset(c.total, 0, c.num_rows * sizeof(float));
    for (int64_t row = 0; row < c.num_rows; row++) c.highest[row] = -INFINITY;
    for (int64_t start = 0; start < c.num_tokens; start += TILE) {
        const int number = c.num_tokens - start < TILE ? c.num_tokens - start : TILE;
        if (number < TILE) memset(tile, 0, sizeof tile);
        widen(c.key + start * c.key_size, tile, number * c.key_size);
        for (int64_t row = 0; row < c.num_rows; row += ROWS_AT_ONCE)
            OF_ROWS(score, c.query + row * c.key_size, tile, c.key_size, scores + row)
        for (int64_t row = 0; row < c.num_rows; row++)
            weigh(scores[row], c.key_scale + start, c.value_scale + start, number, c.out + row * c.value_size,
                  c.value_size, c.highest + row, c.total + row);
        if (number < TILE) memset(tile, 0, sizeof tile);
        widen(c.value + start * c.value_size, tile, number * c.value_size);
        for (int64_t row = 0; row < c.num_rows; row += ROWS_AT_ONCE)
            OF_ROWS(add, scores + row, tile, c.value_size, c.out + row * c.value_size)
    }
}

} // namespace

// Query [num_heads, num_rows, key_size], scaled. Of each head, tokens lie side by side; heads are `.._stride` apart.
struct Sizes {
    int64_t num_heads, num_rows, num_tokens, tokens_per_chunk, key_size, value_size;
    int64_t key_stride, key_scale_stride, value_stride, value_scale_stride, num_threads;
};

// One row of a head: the parts of its chunks, weighted by their highest scores and sums.
static void merge(const Sizes &s, int64_t num_chunks, int64_t row, const float *parts, float *out, float *lse) {
    const int64_t of_task = s.num_rows * (s.value_size + 2), highest = s.num_rows * s.value_size + row;
    float most = parts[highest], total = 0;
    for (int64_t i = 1; i < num_chunks; i++) {
        const float of_chunk = parts[i * of_task + highest];
        most = of_chunk > most || of_chunk != of_chunk ? of_chunk : most;
    }
    memset(out, 0, s.value_size * sizeof(float));
    for (int64_t i = 0; i < num_chunks; i++) {
        const float *part = parts + i * of_task;
        const float weight = expf(part[highest] - most);
        total += weight * part[highest + s.num_rows];
        for (int64_t j = 0; j < s.value_size; j++) out[j] += weight * part[row * s.value_size + j];
    }
    for (int64_t j = 0; j < s.value_size; j++) out[j] /= total;
    *lse = logf(total) + most;
}

// Out [num_heads, num_rows, value_size] and its log-sum-exp [num_heads, num_rows]. Of each task, `partials` has
// room for [num_rows, value_size + 2].
extern "C" void attend(const Sizes *sizes, const float *query, const int8_t *key, const float *key_scale,
                       const int8_t *value, const float *value_scale, float *partials, float *out, float *lse) {
    const Sizes s = *sizes;
    const int64_t num_chunks = (s.num_tokens + s.tokens_per_chunk - 1) / s.tokens_per_chunk;
    const int64_t of_task = s.num_rows * (s.value_size + 2);
#pragma omp parallel for schedule(dynamic) num_threads(s.num_threads)
    for (int64_t task = 0; task < s.num_heads * num_chunks; task++) {
        const int64_t head = task / num_chunks, start = task % num_chunks * s.tokens_per_chunk;
        Chunk c;
        c.query = query + head * s.num_rows * s.key_size;
        c.key = key + head * s.key_stride + start * s.key_size;
        c.key_scale = key_scale + head * s.key_scale_stride + start;
        c.value = value + head * s.value_stride + start * s.value_size;
        c.value_scale = value_scale + head * s.value_scale_stride + start;
        c.num_rows = s.num_rows;
        c.num_tokens = s.num_tokens - start < s.tokens_per_chunk ? s.num_tokens - start : s.tokens_per_chunk;
        c.key_size = s.key_size;
        c.value_size = s.value_size;
        c.out = partials + task * of_task;
        c.highest = c.out + s.num_rows * s.value_size;
        c.total = c.highest + s.num_rows;
        attend_to(c);
    }
    // Few numbers: that another thread takes some would cost more than it saves.
    for (int64_t row = 0; row < s.num_heads * s.num_rows; row++)
        merge(s, num_chunks, row % s.num_rows, partials + row / s.num_rows * num_chunks * of_task,
              out + row * s.value_size, lse + row);
}
