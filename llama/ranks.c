/* Sums and sequences of what the ranks of one machine have, through memory that they share.
 *
 * Knows bytes in turns; knows no processes: a rank that has waited for a while returns, and whoever called it looks why.
 *
 * The memory begins with a cache line for each rank, in which stands the number of its latest turn. Then come two rows of
 * slots, one slot a rank, which turns use alternately: when a rank enters a turn, all have left the one before the last,
 * and none reads its slot of that any more.
 */

#include <immintrin.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

enum { LINE = 64, SLOT = 1 << 18, SPINS = 2000, YIELDS = 20000 };

static uint64_t *turn_of(char *memory, long rank) { return (uint64_t *)(memory + rank * LINE); }

static char *slot(char *memory, long ranks, long rank, uint64_t turn) {
    return memory + ranks * LINE + ((long)(turn % 2) * ranks + rank) * SLOT;
}

/* Put `bytes` where the others find them, unless that was done, and wait for theirs. 0: they aren't there yet. */
static int meet(char *memory, long rank, long ranks, const void *own, long bytes, long entered) {
    const uint64_t turn = *turn_of(memory, rank) + !entered;
    if (!entered) {
        memcpy(slot(memory, ranks, rank, turn), own, (size_t)bytes);
        __atomic_store_n(turn_of(memory, rank), turn, __ATOMIC_RELEASE);
    }
    for (long other = 0; other < ranks; other++)
        for (long waited = 0; __atomic_load_n(turn_of(memory, other), __ATOMIC_ACQUIRE) < turn; waited++) {
            if (waited > YIELDS) return 0;
            if (waited > SPINS) sched_yield();
            else _mm_pause();
        }
    return 1;
}

/* x (count) becomes the sum of what the ranks have, in their order, so that it is the same on all. Returns as `meet`. */
long sum_of_ranks_float(char *memory, long rank, long ranks, float *x, long count, long entered, int threads) {
    (void)threads;
    if (!meet(memory, rank, ranks, x, count * 4, entered)) return 0;
    const uint64_t turn = *turn_of(memory, rank);
    memcpy(x, slot(memory, ranks, 0, turn), (size_t)count * 4);
    for (long other = 1; other < ranks; other++) {
        const float *theirs = (const float *)slot(memory, ranks, other, turn);
        for (long i = 0; i < count; i++) x[i] += theirs[i];
    }
    return 1;
}

long sum_of_ranks_bf16(char *memory, long rank, long ranks, uint16_t *x, long count, long entered, int threads) {
    (void)threads;
    if (!meet(memory, rank, ranks, x, count * 2, entered)) return 0;
    const uint64_t turn = *turn_of(memory, rank);
    for (long i = 0; i < count; i++) {
        float sum = 0;
        for (long other = 0; other < ranks; other++) {
            const uint32_t bits = (uint32_t)((const uint16_t *)slot(memory, ranks, other, turn))[i] << 16;
            float one;
            memcpy(&one, &bits, 4);
            sum += one;
        }
        uint32_t bits;
        memcpy(&bits, &sum, 4);
        x[i] = sum != sum ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    return 1;
}

/* The `bytes` of each rank to y, where they begin `apart` bytes from each other. Returns as `meet`. */
long gather_of_ranks(char *memory, long rank, long ranks, const char *x, long bytes, char *y, long apart, long entered,
                     int threads) {
    (void)threads;
    if (!meet(memory, rank, ranks, x, bytes, entered)) return 0;
    for (long other = 0; other < ranks; other++)
        memcpy(y + other * apart, slot(memory, ranks, other, *turn_of(memory, rank)), (size_t)bytes);
    return 1;
}
