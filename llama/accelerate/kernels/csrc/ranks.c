/* Sums and sequences of what the ranks of one machine have, through memory that they share.
 *
 * Knows bytes in turns; knows no processes: a rank that has waited for a while returns, and whoever called it looks why.
 *
 * The memory begins with a cache line for each rank, in which stands the number of its latest turn. Then come two rows of
 * slots, one slot a rank, which turns use alternately: when a rank enters a turn, all have left the one before the last,
 * and none reads its slot of that any more.
 */

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "vectors.h"

enum { LINE = 64, SLOT = 1 << 18, NANOSECONDS = 20000000 };

static uint64_t *turn_of(char *memory, long rank) { return (uint64_t *)(memory + rank * LINE); }

static char *slot(char *memory, long ranks, long rank, uint64_t turn) {
    return memory + ranks * LINE + ((long)(turn % 2) * ranks + rank) * SLOT;
}

/* Whether a rank has come to this turn, after a look at it so often, and then a sleep of 20 ms at most. */
static int has_come(uint64_t *its, uint64_t turn, long spins) {
    for (; spins > 0; spins--, __builtin_ia32_pause())
        if (__atomic_load_n(its, __ATOMIC_ACQUIRE) >= turn) return 1;
    for (uint64_t now; (now = __atomic_load_n(its, __ATOMIC_ACQUIRE)) < turn;) {
        const struct timespec most = {0, NANOSECONDS};
        if (syscall(SYS_futex, its, FUTEX_WAIT, (uint32_t)now, &most, NULL, 0) < 0 && errno != EAGAIN) return 0;
    }
    return 1;
}

/* Put `bytes` where the others find them, unless that was done, and wait for theirs. 0: they aren't there yet. */
static int meet(char *memory, long rank, long ranks, const void *own, long bytes, long spins, long entered) {
    const uint64_t turn = *turn_of(memory, rank) + !entered;
    if (!entered) {
        memcpy(slot(memory, ranks, rank, turn), own, (size_t)bytes);
        __atomic_store_n(turn_of(memory, rank), turn, __ATOMIC_RELEASE);
        syscall(SYS_futex, turn_of(memory, rank), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    for (long other = 0; other < ranks; other++)
        if (!has_come(turn_of(memory, other), turn, spins)) return 0;
    return 1;
}

/* x (count) becomes the sum of what the ranks have, in their order, so that it is the same on all. Returns as `meet`. */
INLINE long sum_of_ranks(char *memory, long rank, long ranks, char *x, long count, long spins, long entered, int bf16) {
    const long size = bf16 ? 2 : 4, whole = count / LANES;
    if (!meet(memory, rank, ranks, x, count * size, spins, entered)) return 0;
    const uint64_t turn = *turn_of(memory, rank);
    for (long i = 0; i < whole; i++) {
        floats sum = load(slot(memory, ranks, 0, turn), i, bf16);
        for (long other = 1; other < ranks; other++) sum += load(slot(memory, ranks, other, turn), i, bf16);
        store(x, i, sum, bf16);
    }
    for (long i = whole * LANES; i < count; i++) {
        float sum = get(slot(memory, ranks, 0, turn), i, bf16);
        for (long other = 1; other < ranks; other++) sum += get(slot(memory, ranks, other, turn), i, bf16);
        put(x, i, bf16, sum);
    }
    return 1;
}

#define SUM_OF_RANKS(name, bf16) \
    long name(char *memory, long rank, long ranks, char *x, long count, long spins, long entered, int threads) { \
        (void)threads; \
        return sum_of_ranks(memory, rank, ranks, x, count, spins, entered, bf16); \
    }
SUM_OF_RANKS(sum_of_ranks_float, 0)
SUM_OF_RANKS(sum_of_ranks_bf16, 1)

/* The `bytes` of each rank to y, where they begin `apart` bytes from each other. Returns as `meet`. */
long gather_of_ranks(char *memory, long rank, long ranks, const char *x, long bytes, char *y, long apart, long spins,
                     long entered, int threads) {
    (void)threads;
    if (!meet(memory, rank, ranks, x, bytes, spins, entered)) return 0;
    for (long other = 0; other < ranks; other++)
        memcpy(y + other * apart, slot(memory, ranks, other, *turn_of(memory, rank)), (size_t)bytes);
    return 1;
}
