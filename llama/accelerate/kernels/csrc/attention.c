/* Attention over the KV cache, of one new token a row and of many. The terms are explained in vectors.h. */

#include "vectors.h"

enum { FEW = 4 };        /* queries that use a key each time that it is loaded */
enum { QUERIES = 256 };  /* queries that use a block of keys before the next one is packed */

/* --- attention of one new token a row: one pass over the cache --------------------------------------------------------- */

/* The sums of LANES vectors, as one vector: pairs of vectors are added until one is left. */
INLINE floats sum_vectors(floats *x) {
    const ints low = number_lanes() * 2, high = low + 1;
    UNROLL for (int count = LANES / 2; count >= 1; count /= 2) UNROLL for (int i = 0; i < count; i++)
        x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], low) + __builtin_shuffle(x[2 * i], x[2 * i + 1], high);
    return x[0];
}

/* The sum of a vector's numbers. */
INLINE float sum_lanes(floats x) {
    float sum = 0;
    for (long i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* The largest number of a vector, in all its lanes. */
INLINE floats max_lanes(floats x) {
    UNROLL for (int width = LANES / 2; width >= 1; width /= 2) x = max_of(x, __builtin_shuffle(x, number_lanes() ^ width));
    return x;
}

/* Rotate each pair of neighbours of x (D) by its angle, a complex number. */
INLINE void rotate(const char *x, const float *angles, char *out, long D, int bf16) {
    const ints lane_numbers = number_lanes(), first = lane_numbers & ~1, other = lane_numbers ^ 1;
    const floats sign = __builtin_convertvector((lane_numbers & 1) * 2 - 1, floats);
    for (long v = 0; v < D / LANES; v++) {
        const floats numbers = load(x, v, bf16), angle = load((const char *)angles, v, 0);
        const floats cosine = __builtin_shuffle(angle, first), sine = __builtin_shuffle(angle, first + 1);
        store(out, v, numbers * cosine + __builtin_shuffle(numbers, other) * sine * sign, bf16);
    }
}

/* The state of a softmax over positions that come in turn (arXiv:1805.02867), of FEW queries of one key/value head: the sum
 * of the weights so far, relative to the largest score so far, and that score. */
typedef struct { floats mass[FEW], most[FEW]; } Softmax;

/* Add `count` positions, LANES at most, with these keys and values, (count, D), to the softmax and to the sums of weighted
 * values: q, out (FEW, D). V = D / LANES vectors. */
INLINE void add_positions(const floats *q, const char *keys, const char *values, floats *out, Softmax *w, long count,
                          const long V, int bf16) {
    floats parts[FEW][LANES], shrink[FEW];
    float weights[FEW][LANES];
    for (long t = 0; t < count; t++) {
        floats sum[FEW];
        UNROLL for (int g = 0; g < FEW; g++) sum[g] = (floats){0};
        for (long v = 0; v < V; v++) {
            const floats key = load(keys, t * V + v, bf16);
            UNROLL for (int g = 0; g < FEW; g++) sum[g] += q[g * V + v] * key;
        }
        UNROLL for (int g = 0; g < FEW; g++) parts[g][t] = sum[g];
    }
    for (int g = 0; g < FEW; g++) {
        for (long t = count; t < LANES; t++) parts[g][t] = (floats){0} - 1e30f;
        const floats score = sum_vectors(parts[g]), most = max_of(w->most[g], max_lanes(score));
        const floats weight = exponential(score - most);
        shrink[g] = exponential(w->most[g] - most);
        w->most[g] = most;
        w->mass[g] = w->mass[g] * shrink[g] + weight;
        *(loose_floats *)weights[g] = weight;
    }
    for (long v = 0; v < V; v++) {
        floats sum[FEW];
        UNROLL for (int g = 0; g < FEW; g++) sum[g] = out[g * V + v] * shrink[g];
        for (long t = 0; t < count; t++) {
            const floats value = load(values, t * V + v, bf16);
            UNROLL for (int g = 0; g < FEW; g++) sum[g] += weights[g][t] * value;
        }
        UNROLL for (int g = 0; g < FEW; g++) out[g * V + v] = sum[g];
    }
}

/* Attention of q (FEW, D) to positions from..to of the cached keys and values, (S, D): out (FEW, D). */
INLINE void attend_few(const floats *q, const char *keys, const char *values, floats *out, const long V, long from, long to,
                       int bf16) {
    const long size = V * LANES * (bf16 ? 2 : 4);
    Softmax w;
    for (int g = 0; g < FEW; g++) w.most[g] = (floats){0} - 1e30f, w.mass[g] = (floats){0};
    for (long i = 0; i < FEW * V; i++) out[i] = (floats){0};
    for (; from + LANES <= to; from += LANES)
        add_positions(q, keys + from * size, values + from * size, out, &w, LANES, V, bf16);
    if (from < to) add_positions(q, keys + from * size, values + from * size, out, &w, to - from, V, bf16);
    for (int g = 0; g < FEW; g++) {
        const float sum = sum_lanes(w.mass[g]);
        for (long v = 0; v < V; v++) out[g * V + v] /= sum;
    }
}

/* One key/value head of one row: write its new key and value to the caches, (S, D), and attend with its queries. */
INLINE void attend_head(const char *q, const char *k, const char *v, char *keys, char *values, const float *angles,
                           char *out, long group, long D, long end, long window, int bf16) {
    const long size = bf16 ? 2 : 4, from = end > window ? end - window : 0;
    const floats scale = (floats){0} + 1 / __builtin_sqrtf((float)D);
    const long V = D / LANES, padded = (group + FEW - 1) / FEW * FEW;
    floats queries[padded][V], sums[padded][V];
    char rotated[D * size];
    memset(queries, 0, sizeof queries);
    rotate(k, angles, keys + (end - 1) * D * size, D, bf16);
    memcpy(values + (end - 1) * D * size, v, (size_t)(D * size));
    for (long g = 0; g < group; g++) {
        rotate(q + g * D * size, angles, rotated, D, bf16);
        for (long i = 0; i < V; i++) queries[g][i] = load(rotated, i, bf16) * scale;
    }
    for (long g = 0; g < group; g += FEW)
        switch (D) {  /* the usual sizes have compiled code of their own */
            case 64: attend_few(queries[g], keys, values, sums[g], 64 / LANES, from, end, bf16); break;
            case 128: attend_few(queries[g], keys, values, sums[g], 128 / LANES, from, end, bf16); break;
            default: attend_few(queries[g], keys, values, sums[g], V, from, end, bf16);
        }
    for (long g = 0; g < group; g++)
        for (long i = 0; i < V; i++) store(out, g * V + i, sums[g][i], bf16);
}

/* Where a key/value head of row b begins in a cache, (slots, KV, S, D), in heads of D numbers. */
INLINE long find_cached(const int64_t *slots, long b, long kv_head, long KV, long S) {
    return ((slots ? slots[b] : b) * KV + kv_head) * S;
}

/* `attention` of one token a row; rows that start below 0 are left out. */
INLINE void attend_once(const char *q, const char *k, const char *v, char *cache_k, char *cache_v, const float *angles,
                        const int64_t *starts, const int64_t *slots, char *out, long B, long H, long KV, long D, long S,
                        long window, long stride, int bf16) {
    const long group = H / KV, head = D * (bf16 ? 2 : 4);
#pragma omp for schedule(dynamic, 1) nowait
    for (long task = 0; task < B * KV; task++) {
        if (starts[task / KV] < 0) continue;
        const long cached = find_cached(slots, task / KV, task % KV, KV, S) * head;
        attend_head(q + task * group * head, k + task * head, v + task * head, cache_k + cached, cache_v + cached,
                    angles + task / KV * stride, out + task * group * head, group, D, starts[task / KV] + 1, window, bf16);
    }
}

/* --- attention of many new tokens a row: products with blocks of 64 keys, and of their values -------------------------- */

/* Pack up to 64 values (count, D) in D / 64 blocks, rounded up, whose steps go along the keys; zeros where there is none. */
INLINE void pack_values(const char *values, words *blocks, long count, long D, int bf16) {
    const long together = bf16 ? 2 : 1, steps = BLOCK / together;
    for (long v = 0; v < (D + BLOCK - 1) / BLOCK * VECTORS; v++)
        for (long k = 0; k < steps; k++) {
            words numbers = {0};
            for (long i = 0; i < together; i++) {
                const long key = k * together + i;
                if (key < count && v * LANES < D) {
                    const words one = (words)load(values + key * D * (bf16 ? 2 : 4), v, bf16);
                    numbers |= bf16 && i == 0 ? one >> 16 : one;
                }
            }
            blocks[(v / VECTORS * steps + k) * VECTORS + v % VECTORS] = numbers;
        }
}

/* The state of the softmax, as above, of FLOAT_ROWS queries, and the positions of their tokens. */
typedef struct { floats mass[FLOAT_ROWS]; float most[FLOAT_ROWS]; long positions[FLOAT_ROWS]; } QueryTile;

#define MULTIPLY(name, bf16) \
    static APART void name(floats sum[][VECTORS], const char *x, const char *w, long steps) { \
        multiply(sum, FLOAT_ROWS, x, w, steps, bf16); \
    }
MULTIPLY(multiply_float, 0)
MULTIPLY(multiply_bf16, 1)

/* Add 64 positions from `first` on, of which each query sees those up to its own within the window, to the softmax and to
 * the sums of weighted values. keys, values: blocks; q (FLOAT_ROWS, D); sums (FLOAT_ROWS, D rounded up to 64). */
INLINE void attend_tile(QueryTile *rows, const char *q, const char *keys, const char *values, floats *sums, long D,
                        long first, long window, int bf16) {
    const long size = bf16 ? 2 : 4, steps = BLOCK * size / 4, chunks = (D + BLOCK - 1) / BLOCK;
    const float scale = 1 / __builtin_sqrtf((float)D);
    floats score[FLOAT_ROWS][VECTORS], shrink[FLOAT_ROWS];
    char weights[FLOAT_ROWS * BLOCK * 4];
    UNROLL for (int m = 0; m < FLOAT_ROWS; m++) UNROLL for (int v = 0; v < VECTORS; v++) score[m][v] = (floats){0};
    (bf16 ? multiply_bf16 : multiply_float)(score, q, keys, D * size / 4);
    for (int m = 0; m < FLOAT_ROWS; m++) {
        const long last = rows->positions[m] - first, before = last - window;
        const floats low = (floats){0} - 1e30f;
        for (int v = 0; v < VECTORS; v++) {
            score[m][v] *= scale;
            if (last < BLOCK - 1 || before >= 0) {
                const ints place = number_lanes() + v * LANES;
                const ints seen = (place <= (int32_t)last) & (place > (int32_t)before);
                score[m][v] = choose(seen, score[m][v], low);
            }
        }
        floats among = score[m][0];
        for (int v = 1; v < VECTORS; v++) among = max_of(among, score[m][v]);
        const floats old = low * 0 + rows->most[m], most = max_of(old, max_lanes(among));
        shrink[m] = exponential(old - most);
        rows->most[m] = most[0];
        rows->mass[m] *= shrink[m];
        for (int v = 0; v < VECTORS; v++) {
            const floats weight = exponential(score[m][v] - most);
            rows->mass[m] += weight;
            store(weights, m * VECTORS + v, weight, bf16);
        }
    }
    for (long c = 0; c < chunks; c++) {
        floats sum[FLOAT_ROWS][VECTORS];
        UNROLL for (int m = 0; m < FLOAT_ROWS; m++) UNROLL for (int v = 0; v < VECTORS; v++)
            sum[m][v] = sums[(m * chunks + c) * VECTORS + v] * shrink[m];
        (bf16 ? multiply_bf16 : multiply_float)(sum, weights, values + c * BLOCK * BLOCK * size, steps);
        UNROLL for (int m = 0; m < FLOAT_ROWS; m++) UNROLL for (int v = 0; v < VECTORS; v++)
            sums[(m * chunks + c) * VECTORS + v] = sum[m][v];
    }
}

/* Attention of one key/value head's queries, of tokens from..to of a row's T new ones, to the cached keys and values,
 * (S, D), up to their own. q, out: (T, H, D) of this row, from the head's first query on. start: the position of the first
 * of the T tokens. */
INLINE void attend_block(const char *q, const char *keys, const char *values, const float *angles, char *out, long from,
                         long to, long start, long H, long group, long D, long window, int bf16) {
    const long size = bf16 ? 2 : 4, chunks = (D + BLOCK - 1) / BLOCK, head = D * size, end = start + to;
    const long count = (to - from) * group, few = (count + FLOAT_ROWS - 1) / FLOAT_ROWS, lowest = start + from + 1 - window;
    words key_block[head / 4 * VECTORS], value_blocks[chunks * BLOCK * size / 4 * VECTORS];
    floats sums[few * FLOAT_ROWS * chunks * VECTORS];
    char queries[few * FLOAT_ROWS * head];
    QueryTile rows[few];
    memset(sums, 0, sizeof sums);
    memset(queries, 0, sizeof queries);
    for (long r = 0; r < few * FLOAT_ROWS; r++) {
        const long t = from + (r < count ? r : count - 1) / group;
        rows[r / FLOAT_ROWS].positions[r % FLOAT_ROWS] = start + t;
        rows[r / FLOAT_ROWS].most[r % FLOAT_ROWS] = -1e30f;
        rows[r / FLOAT_ROWS].mass[r % FLOAT_ROWS] = (floats){0};
        if (r < count) rotate(q + (t * H + r % group) * head, angles + t * D, queries + r * head, D, bf16);
    }
    for (long first = lowest > 0 ? lowest : 0; first < end; first += BLOCK) {
        const long keys_left = count_left(first, BLOCK, end);
        pack_block((const loose_word *)(keys + first * head), (uint32_t *)key_block, keys_left, head / 4);
        pack_values(values + first * head, value_blocks, keys_left, D, bf16);
        for (long i = 0; i < few; i++)
            if (first <= rows[i].positions[FLOAT_ROWS - 1] && first + BLOCK > rows[i].positions[0] + 1 - window)
                attend_tile(rows + i, queries + i * FLOAT_ROWS * head, (const char *)key_block, (const char *)value_blocks,
                            sums + i * FLOAT_ROWS * chunks * VECTORS, D, first, window, bf16);
    }
    for (long r = 0; r < count; r++) {
        const float sum = sum_lanes(rows[r / FLOAT_ROWS].mass[r % FLOAT_ROWS]);
        for (long v = 0; v < D / LANES; v++)
            store(out + ((from + r / group) * H + r % group) * head, v, sums[r * chunks * VECTORS + v] / sum, bf16);
    }
}

/* `attention` of T tokens a row. */
INLINE void attend_long(const char *q, const char *k, const char *v, char *cache_k, char *cache_v, const float *angles,
                        const int64_t *starts, const int64_t *slots, char *out, long B, long T, long H, long KV, long D,
                        long S, long window, long stride, int bf16) {
    const long group = H / KV, head = D * (bf16 ? 2 : 4);
    const long per_task = (QUERIES + group - 1) / group, blocks = (T + per_task - 1) / per_task;
#pragma omp for
    for (long i = 0; i < B * T * KV; i++) {
        const long b = i / KV / T, t = i / KV % T;
        const long place = (find_cached(slots, b, i % KV, KV, S) + starts[b] + t) * head;
        rotate(k + i * head, angles + b * stride + t * D, cache_k + place, D, bf16);
        memcpy(cache_v + place, v + i * head, (size_t)head);
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (long task = B * KV * blocks - 1; task >= 0; task--) {  /* the longest tasks come first */
        const long b = task % (B * KV) / KV, n = task % KV, from = task / (B * KV) * per_task;
        const long place = (b * T * H + n * group) * head, cached = find_cached(slots, b, n, KV, S) * head;
        attend_block(q + place, cache_k + cached, cache_v + cached, angles + b * stride, out + place, from,
                     from + count_left(from, per_task, T), starts[b], H, group, D, window < S ? window : S, bf16);
    }
}

/* q, out (B, T, H, D), k and v (B, T, KV, D): of the T tokens of each row, which begin at position `starts` (B). slots (B):
 * where rows lie in the caches; null: row b at b. angles: complex numbers (T, D / 2) of each row; those of two rows are
 * `stride` floats apart. Writes the rotated keys, and the values, to the caches (slots, KV, S, D). Each query then attends
 * to the last `window` positions up to its own. */
INLINE int attention(const char *q, const char *k, const char *v, char *cache_k, char *cache_v, const float *angles,
                     const int64_t *starts, const int64_t *slots, char *out, long B, long T, long H, long KV, long D,
                     long S, long window, long stride, int bf16) {
#define CACHES q, k, v, cache_k, cache_v, angles, starts, slots, out
    if (T == 1) attend_once(CACHES, B, H, KV, D, S, window, stride, bf16);
    else attend_long(CACHES, B, T, H, KV, D, S, window, stride, bf16);
    return 1;
}

/* q, k, v, cache_k, cache_v, angles, starts, slots, out, B, T, H, KV, D, S, window, stride */
#define ATTENTION(name, bf16) \
    KERNEL(name) { \
        return attention(a[0].at, a[1].at, a[2].at, a[3].at, a[4].at, a[5].at, a[6].at, a[7].at, a[8].at, a[9].n, \
                         a[10].n, a[11].n, a[12].n, a[13].n, a[14].n, a[15].n, a[16].n, bf16); \
    }
ATTENTION(attention_float, 0)
ATTENTION(attention_bf16, 1)
