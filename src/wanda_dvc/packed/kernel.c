/* A packed matrix times a few vectors, and a packed matrix expanded. Plain C, without headers of torch or Python.
 *
 * A packed matrix [rows, columns] has its nonzeros row by row, the index of each row's first one, and one bit a weight:
 * ceil(columns / 8) bytes a row, the first column in the highest bit. A product with one vector reads each weight once
 * and waits for memory; nonzeros and bits are fewer bytes than the matrix. Several rows are read at once, so that more
 * loads are under way and a piece of the vector is loaded once for all of them. Sums are float32.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { GENERIC, AVX2, AVX512 };            /* the paths, the slowest first */
enum { VECTORS = 8 };                      /* at once */
enum { CHUNK = 32, BLOCK = 16 * CHUNK };   /* columns that are multiplied at once, and whose bits are read at once */
enum { AHEAD = 512 };                      /* bytes that are fetched before they are needed */

typedef struct task task;
typedef void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel's */

struct task {
    const void *values;
    const uint8_t *bits;
    const int64_t *starts; /* [rows + 1] */
    const float *x;        /* [vectors, stride], zeros after the last column */
    const void *bias;      /* [rows], or null */
    void *out;             /* [vectors, rows]; of an expansion [rows, columns] */
    int64_t rows, columns, bytes, stride, vectors;
    int64_t next, step; /* the first row that no thread has taken, and how many one takes */
    void (*run)(const task *, int64_t first, int64_t last);
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float widen(uint16_t number) {
    uint32_t bits = (uint32_t)number << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* Round to bfloat16, ties to even. */
INLINE uint16_t narrow(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    if (wide != wide) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE void put_bf16(const task *t, int64_t row, int64_t vector, float sum) {
    if (t->bias) sum += widen(((const uint16_t *)t->bias)[row]);
    ((uint16_t *)t->out)[vector * t->rows + row] = narrow(sum);
}

INLINE void put_f32(const task *t, int64_t row, int64_t vector, float sum) {
    if (t->bias) sum += ((const float *)t->bias)[row];
    ((float *)t->out)[vector * t->rows + row] = sum;
}

/* --- generic --- */

INLINE void multiply_rows(const task *t, int64_t first, int64_t last, const int wide) {
    for (int64_t row = first; row < last; row++) {
        const uint8_t *bits = t->bits + row * t->bytes;
        int64_t at = t->starts[row];
        float sums[VECTORS] = {0};
        for (int64_t byte = 0; byte < t->bytes; byte++)
            for (unsigned left = bits[byte]; left; at++) {
                const int column = __builtin_clz(left) - 24;
                left ^= 128u >> column;
                const float weight = wide ? ((const float *)t->values)[at] : widen(((const uint16_t *)t->values)[at]);
                const float *x = t->x + 8 * byte + column;
                for (int v = 0; v < t->vectors; v++) sums[v] += weight * x[v * t->stride];
            }
        for (int v = 0; v < t->vectors; v++)
            if (wide)
                put_f32(t, row, v, sums[v]);
            else
                put_bf16(t, row, v, sums[v]);
    }
}

INLINE void expand_rows(const task *t, int64_t first, int64_t last, const int size) {
    const char *from = (const char *)t->values + size * t->starts[first];
    char *to = (char *)t->out + size * first * t->columns;
    for (int64_t row = first; row < last; row++)
        for (int64_t column = 0; column < t->columns; column++, to += size)
            if (t->bits[row * t->bytes + column / 8] & 128 >> column % 8) {
                memcpy(to, from, size);
                from += size;
            } else
                memset(to, 0, size);
}

static void generic_bf16(const task *t, int64_t first, int64_t last) { multiply_rows(t, first, last, 0); }
static void generic_f32(const task *t, int64_t first, int64_t last) { multiply_rows(t, first, last, 1); }
static void generic_expand2(const task *t, int64_t first, int64_t last) { expand_rows(t, first, last, 2); }
static void generic_expand4(const task *t, int64_t first, int64_t last) { expand_rows(t, first, last, 4); }

#if defined(__x86_64__)
#include <immintrin.h>

/* A path's product: `tile` takes as many rows at once as its registers hold. It loads whole vectors, which may pass the
 * end of a row. Near the end of the matrix it takes rows one by one, carefully: no load passes the row. */
#define PRODUCT(name, TARGET, tile, at_once)                                                                           \
    TARGET INLINE void name##_of(const task *t, int64_t first, int64_t last, const int vectors) {                      \
        const int many = at_once(vectors);                                                                             \
        for (int64_t row = first; row < last;)                                                                         \
            if (row + many <= last && t->starts[row + many] + CHUNK <= t->starts[t->rows]) {                           \
                tile(t, row, many, vectors, 0);                                                                        \
                row += many;                                                                                           \
            } else                                                                                                     \
                tile(t, row++, 1, vectors, 1);                                                                         \
    }                                                                                                                  \
    TARGET static void name(const task *t, int64_t first, int64_t last) {                                              \
        switch (t->vectors) {                                                                                          \
        case 1: name##_of(t, first, last, 1); break;                                                                   \
        case 2: name##_of(t, first, last, 2); break;                                                                   \
        case 3: name##_of(t, first, last, 3); break;                                                                   \
        case 4: name##_of(t, first, last, 4); break;                                                                   \
        case 5: name##_of(t, first, last, 5); break;                                                                   \
        case 6: name##_of(t, first, last, 6); break;                                                                   \
        case 7: name##_of(t, first, last, 7); break;                                                                   \
        case 8: name##_of(t, first, last, 8); break;                                                                   \
        }                                                                                                              \
    }

/* --- AVX-512 with VBMI2: one instruction expands 32 bfloat16 or 16 float32 --- */

#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,gfni,popcnt,bmi,bmi2,fma")))
#define ROWS_AVX512(vectors) ((vectors) <= 2 ? 8 : (vectors) <= 4 ? 4 : 2) /* at most 16 sums, of 32 registers */

/* The bits of up to 512 columns, the first one lowest, as the instruction wants them. */
WITH_AVX512 INLINE void masks_of(const task *t, int64_t row, int64_t column, uint32_t masks[BLOCK / CHUNK]) {
    const int64_t bytes = t->bytes - column / 8;
    const __mmask64 present = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
    const __m512i bits = _mm512_maskz_loadu_epi8(present, t->bits + row * t->bytes + column / 8);
    const __m512i reverse = _mm512_set1_epi64((int64_t)0x8040201008040201ull);
    _mm512_storeu_si512(masks, _mm512_gf2p8affine_epi64_epi8(bits, reverse, 0));
}

WITH_AVX512 INLINE __m512i next_16(const uint16_t *values, uint32_t mask, const int careful) {
    const __m512i some = careful ? _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, _mm_popcnt_u32(mask)), values)
                                 : _mm512_loadu_si512(values);
    return _mm512_maskz_expand_epi16(mask, some);
}

WITH_AVX512 INLINE __m512i next_32(const uint32_t *values, uint32_t mask, const int careful) {
    const __m512i some = careful ? _mm512_maskz_loadu_epi32(_bzhi_u32(~0u, _mm_popcnt_u32(mask)), values)
                                 : _mm512_loadu_si512(values);
    return _mm512_maskz_expand_epi32((__mmask16)mask, some);
}

/* 32 weights as two vectors of float32. Of bfloat16 they are the even and the odd columns, by a shift and a mask; x has
 * the same order. */
#define NEXT_BF16                                                                                                      \
    const __m512i both = next_16(values[r], mask, careful);                                                            \
    const __m512 low = (__m512)_mm512_slli_epi32(both, 16);                                                            \
    const __m512 high = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
#define NEXT_F32                                                                                                       \
    const __m512 low = (__m512)next_32(values[r], mask & 0xffff, careful);                                             \
    const __m512 high = (__m512)next_32(values[r] + _mm_popcnt_u32(mask & 0xffff), mask >> 16, careful);

#define TILE_AVX512(name, number, NEXT, put)                                                                           \
    WITH_AVX512 INLINE void name(const task *t, int64_t row, const int rows, const int vectors, const int careful) {   \
        const number *values[8];                                                                                       \
        uint32_t masks[8][BLOCK / CHUNK];                                                                              \
        __m512 sums[8][VECTORS], a[VECTORS], b[VECTORS];                                                               \
        UNROLL for (int r = 0; r < rows; r++) {                                                                        \
            values[r] = (const number *)t->values + t->starts[row + r];                                                \
            UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_ps();                                 \
        }                                                                                                              \
        for (int64_t column = 0; column < t->columns; column += BLOCK) {                                               \
            UNROLL for (int r = 0; r < rows; r++) masks_of(t, row + r, column, masks[r]);                              \
            const int chunks = (int)((smaller(t->columns - column, BLOCK) + CHUNK - 1) / CHUNK);                       \
            for (int chunk = 0; chunk < chunks; chunk++) {                                                             \
                UNROLL for (int v = 0; v < vectors; v++) {                                                             \
                    a[v] = _mm512_load_ps(t->x + v * t->stride + column + chunk * CHUNK);                              \
                    b[v] = _mm512_load_ps(t->x + v * t->stride + column + chunk * CHUNK + 16);                         \
                }                                                                                                      \
                UNROLL for (int r = 0; r < rows; r++) {                                                                \
                    const uint32_t mask = masks[r][chunk];                                                             \
                    NEXT                                                                                               \
                    UNROLL for (int v = 0; v < vectors; v++)                                                           \
                        sums[r][v] = _mm512_fmadd_ps(high, b[v], _mm512_fmadd_ps(low, a[v], sums[r][v]));              \
                    values[r] += _mm_popcnt_u32(mask);                                                                 \
                    _mm_prefetch((const char *)values[r] + AHEAD, _MM_HINT_T0);                                        \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)                                 \
            put(t, row + r, v, _mm512_reduce_add_ps(sums[r][v]));                                                      \
    }

TILE_AVX512(tile_avx512_bf16, uint16_t, NEXT_BF16, put_bf16)
TILE_AVX512(tile_avx512_f32, uint32_t, NEXT_F32, put_f32)
PRODUCT(avx512_bf16, WITH_AVX512, tile_avx512_bf16, ROWS_AVX512)
PRODUCT(avx512_f32, WITH_AVX512, tile_avx512_f32, ROWS_AVX512)

WITH_AVX512 static void avx512_expand2(const task *t, int64_t first, int64_t last) {
    const uint16_t *values = (const uint16_t *)t->values + t->starts[first];
    uint32_t masks[BLOCK / CHUNK];
    for (int64_t row = first; row < last; row++)
        for (int64_t column = 0; column < t->columns; column += CHUNK) {
            if (column % BLOCK == 0) masks_of(t, row, column, masks);
            const uint32_t mask = masks[column % BLOCK / CHUNK];
            uint16_t *to = (uint16_t *)t->out + row * t->columns + column;
            _mm512_mask_storeu_epi16(to, _bzhi_u32(~0u, (uint32_t)smaller(t->columns - column, CHUNK)),
                                     next_16(values, mask, 1));
            values += _mm_popcnt_u32(mask);
        }
}

WITH_AVX512 static void avx512_expand4(const task *t, int64_t first, int64_t last) {
    const uint32_t *values = (const uint32_t *)t->values + t->starts[first];
    uint32_t masks[BLOCK / CHUNK];
    for (int64_t row = first; row < last; row++)
        for (int64_t column = 0; column < t->columns; column += 16) {
            if (column % BLOCK == 0) masks_of(t, row, column, masks);
            const uint32_t mask = masks[column % BLOCK / CHUNK] >> column % CHUNK & 0xffff;
            uint32_t *to = (uint32_t *)t->out + row * t->columns + column;
            _mm512_mask_storeu_epi32(to, (__mmask16)_bzhi_u32(~0u, (uint32_t)smaller(t->columns - column, 16)),
                                     next_32(values, mask, 1));
            values += _mm_popcnt_u32(mask);
        }
}

/* --- AVX2: a table says which of the next nonzeros comes to each of 8 columns --- */

#define WITH_AVX2 __attribute__((target("avx2,fma,popcnt")))
#define ROWS_AVX2(vectors) ((vectors) == 1 ? 8 : (vectors) == 2 ? 4 : (vectors) <= 4 ? 2 : 1) /* 8 sums, of 16 */

static uint8_t bytes_of[256][16]; /* for 2 bytes a weight; 128 is a zero */
static int32_t items_of[256][8];  /* for 4 bytes a weight; negative is a zero */

__attribute__((constructor)) static void fill_tables(void) {
    for (int bits = 0; bits < 256; bits++)
        for (int column = 0, next = 0; column < 8; column++) {
            const int there = bits & 128 >> column;
            bytes_of[bits][2 * column] = there ? 2 * next : 128;
            bytes_of[bits][2 * column + 1] = there ? 2 * next + 1 : 128;
            items_of[bits][column] = there ? next++ : -1;
        }
}

WITH_AVX2 INLINE __m128i eight_16(const uint16_t *values, unsigned bits, const int careful) {
    __m128i some = _mm_setzero_si128();
    if (careful)
        memcpy(&some, values, 2 * _mm_popcnt_u32(bits));
    else
        some = _mm_loadu_si128((const __m128i *)values);
    return _mm_shuffle_epi8(some, _mm_loadu_si128((const __m128i *)bytes_of[bits]));
}

WITH_AVX2 INLINE __m256i eight_32(const uint32_t *values, unsigned bits, const int careful) {
    __m256i some = _mm256_setzero_si256();
    if (careful)
        memcpy(&some, values, 4 * _mm_popcnt_u32(bits));
    else
        some = _mm256_loadu_si256((const __m256i *)values);
    const __m256i items = _mm256_loadu_si256((const __m256i *)items_of[bits]);
    return _mm256_andnot_si256(_mm256_srai_epi32(items, 31), _mm256_permutevar8x32_epi32(some, items));
}

#define EIGHT_BF16 _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_16(values[r], bits, careful)), 16)
#define EIGHT_F32 eight_32(values[r], bits, careful)

WITH_AVX2 INLINE float sum_of(__m256 sums) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#define TILE_AVX2(name, number, EIGHT, put)                                                                            \
    WITH_AVX2 INLINE void name(const task *t, int64_t row, const int rows, const int vectors, const int careful) {     \
        const number *values[8];                                                                                       \
        __m256 sums[8][VECTORS];                                                                                       \
        UNROLL for (int r = 0; r < rows; r++) {                                                                        \
            values[r] = (const number *)t->values + t->starts[row + r];                                                \
            UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm256_setzero_ps();                                 \
        }                                                                                                              \
        for (int64_t byte = 0; byte < t->bytes; byte++)                                                                \
            UNROLL for (int r = 0; r < rows; r++) {                                                                    \
                const unsigned bits = t->bits[(row + r) * t->bytes + byte];                                            \
                const __m256 weights = (__m256)EIGHT;                                                                  \
                UNROLL for (int v = 0; v < vectors; v++)                                                               \
                    sums[r][v] = _mm256_fmadd_ps(weights, _mm256_load_ps(t->x + v * t->stride + 8 * byte), sums[r][v]); \
                values[r] += _mm_popcnt_u32(bits);                                                                     \
                _mm_prefetch((const char *)values[r] + AHEAD, _MM_HINT_T0);                                            \
            }                                                                                                          \
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)                                 \
            put(t, row + r, v, sum_of(sums[r][v]));                                                                    \
    }

TILE_AVX2(tile_avx2_bf16, uint16_t, EIGHT_BF16, put_bf16)
TILE_AVX2(tile_avx2_f32, uint32_t, EIGHT_F32, put_f32)
PRODUCT(avx2_bf16, WITH_AVX2, tile_avx2_bf16, ROWS_AVX2)
PRODUCT(avx2_f32, WITH_AVX2, tile_avx2_f32, ROWS_AVX2)

#define EXPAND_AVX2(name, number, vector, eight)                                                                       \
    WITH_AVX2 static void name(const task *t, int64_t first, int64_t last) {                                           \
        const number *values = (const number *)t->values + t->starts[first];                                           \
        const number *end = (const number *)t->values + t->starts[t->rows];                                            \
        for (int64_t row = first; row < last; row++)                                                                   \
            for (int64_t byte = 0; byte < t->bytes; byte++) {                                                          \
                const unsigned bits = t->bits[row * t->bytes + byte];                                                  \
                const vector weights = end - values >= 8 ? eight(values, bits, 0) : eight(values, bits, 1);            \
                number *to = (number *)t->out + row * t->columns + 8 * byte;                                           \
                memcpy(to, &weights, sizeof(number) * (size_t)smaller(t->columns - 8 * byte, 8));                      \
                values += _mm_popcnt_u32(bits);                                                                        \
            }                                                                                                          \
    }

EXPAND_AVX2(avx2_expand2, uint16_t, __m128i, eight_16)
EXPAND_AVX2(avx2_expand4, uint32_t, __m256i, eight_32)
#else
#define avx512_bf16 generic_bf16
#define avx512_f32 generic_f32
#define avx512_expand2 generic_expand2
#define avx512_expand4 generic_expand4
#define avx2_bf16 generic_bf16
#define avx2_f32 generic_f32
#define avx2_expand2 generic_expand2
#define avx2_expand4 generic_expand4
#endif

/* --- what is called from outside --- */

/* By path, for 2 and for 4 bytes a weight. */
static void (*const products[][2])(const task *, int64_t, int64_t) = {
    {generic_bf16, generic_f32}, {avx2_bf16, avx2_f32}, {avx512_bf16, avx512_f32}};
static void (*const expansions[][2])(const task *, int64_t, int64_t) = {
    {generic_expand2, generic_expand4}, {avx2_expand2, avx2_expand4}, {avx512_expand2, avx512_expand4}};

/* The fastest path of this CPU. */
int wanda_best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("gfni"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return GENERIC;
}

static void work(void *data) {
    task *t = data;
    int64_t first;
    while ((first = __atomic_fetch_add(&t->next, t->step, __ATOMIC_RELAXED)) < t->rows)
        t->run(t, first, smaller(first + t->step, t->rows));
}

/* Share the rows out in pieces, so that a thread that is held up leaves the rest to the others. */
static void start(task *t, unsigned threads, parallel fork) {
    t->next = 0;
    t->step = (t->rows / (8 * (int64_t)threads) + 7) / 8 * 8 + 8;
    if (fork && threads > 1)
        fork(work, t, threads, 0);
    else
        work(t);
}

/* Write the index of each row's first nonzero, [rows + 1]. */
void wanda_starts(const uint8_t *bits, int64_t *starts, int64_t rows, int64_t columns) {
    const int64_t bytes = (columns + 7) / 8;
    starts[0] = 0;
    for (int64_t row = 0; row < rows; row++) {
        starts[row + 1] = starts[row];
        for (int64_t byte = 0; byte < bytes; byte++) starts[row + 1] += __builtin_popcount(bits[row * bytes + byte]);
    }
}

/* out [rows, columns] = the matrix; size: 2 or 4 bytes a weight. */
void wanda_expand(int path, int size, const void *values, const uint8_t *bits, const int64_t *starts, void *out,
                  int64_t rows, int64_t columns, unsigned threads, parallel fork) {
    task t = {.values = values, .bits = bits, .starts = starts, .out = out, .rows = rows, .columns = columns,
              .bytes = (columns + 7) / 8, .run = expansions[path][size == 4]};
    start(&t, threads, fork);
}

/* out [vectors, rows] = x [vectors, columns] times the matrix, plus bias; size: 2 for bfloat16, 4 for float32.
 * Return 0, or 1 where there is no memory. */
int wanda_multiply(int path, int size, const void *values, const uint8_t *bits, const int64_t *starts, const void *x,
                   const void *bias, void *out, int64_t rows, int64_t columns, int64_t vectors, unsigned threads,
                   parallel fork) {
    const int64_t stride = (columns + CHUNK - 1) / CHUNK * CHUNK;
    const int apart = path == AVX512 && size == 2; /* even and odd columns, see NEXT_BF16 */
    float *ready = aligned_alloc(64, (size_t)(4 * VECTORS * stride));
    if (!ready) return 1;
    task t = {.values = values, .bits = bits, .starts = starts, .x = ready, .bias = bias, .rows = rows,
              .columns = columns, .bytes = (columns + 7) / 8, .stride = stride, .run = products[path][size == 4]};
    for (int64_t done = 0; done < vectors; done += t.vectors) {
        t.vectors = smaller(vectors - done, VECTORS);
        t.out = (char *)out + size * done * rows;
        memset(ready, 0, (size_t)(4 * t.vectors * stride));
        for (int64_t v = 0; v < t.vectors; v++)
            for (int64_t column = 0; column < columns; column++) {
                const int64_t from = (done + v) * columns + column;
                const int64_t to = apart ? column / 32 * 32 + column % 2 * 16 + column % 32 / 2 : column;
                ready[v * stride + to] = size == 4 ? ((const float *)x)[from] : widen(((const uint16_t *)x)[from]);
            }
        start(&t, threads, fork);
    }
    free(ready);
    return 0;
}
