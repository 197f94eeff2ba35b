/* A dense bfloat16 matrix times one vector, written as kernel.c of `wanda_dvc.packed` is: what packing itself gains is against this. */
#include <immintrin.h>
#include <stdint.h>

#define UNROLL _Pragma("GCC unroll 8")
enum { ROWS = 8, CHUNK = 32, AHEAD = 512 };

typedef struct {
    const uint16_t *weight; /* [rows, columns]: multiples of 8 and of 32 */
    const float *x;         /* [columns], of 32 the even ones before the odd ones */
    float *out;             /* [rows] */
    int64_t rows, columns, next, step;
} task;

__attribute__((target("avx512f,avx512bw"))) static void multiply(const task *t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += ROWS) {
        __m512 sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) sums[r] = _mm512_setzero_ps();
        for (int64_t column = 0; column < t->columns; column += CHUNK) {
            const __m512 even = _mm512_loadu_ps(t->x + column), odd = _mm512_loadu_ps(t->x + column + 16);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const uint16_t *at = t->weight + (row + r) * t->columns + column;
                const __m512i both = _mm512_loadu_si512(at);
                _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
                sums[r] = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(both, 16), even, sums[r]);
                const __m512i high = _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
                sums[r] = _mm512_fmadd_ps((__m512)high, odd, sums[r]);
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) t->out[row + r] = _mm512_reduce_add_ps(sums[r]);
    }
}

static void work(void *data) {
    task *t = data;
    int64_t first;
    while ((first = __atomic_fetch_add(&t->next, t->step, __ATOMIC_RELAXED)) < t->rows)
        multiply(t, first, first + t->step < t->rows ? first + t->step : t->rows);
}

void dense_multiply(const void *weight, const void *x, void *out, int64_t rows, int64_t columns, unsigned threads,
                    void (*fork)(void (*)(void *), void *, unsigned, unsigned)) {
    task t = {weight, x, out, rows, columns, 0, (rows / (8 * (int64_t)threads) + 7) / 8 * 8 + 8};
    fork(work, &t, threads, 0);
}
