/* All-reduce and all-gather over the ranks of one machine, through memory that they share.
 *
 * Knows bytes and turns; knows no processes. A rank that has waited for a while returns, and its caller finds out why.
 *
 * The memory begins with a cache line for each rank, which holds the number of the rank's latest turn. Two rows of slots
 * follow, one slot a rank. Turns use the two rows alternately: when a rank enters a turn, all ranks have left the turn
 * before the last one, so none reads the slots of that turn any more.
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

/* Wait until a rank has entered this turn: read its latest turn `spins` times, then sleep until that changes, for 20 ms at
 * most each time. Returns whether the rank has entered. */
static int wait_for_rank(uint64_t *latest, uint64_t turn, long spins) {
    for (; spins > 0; spins--, __builtin_ia32_pause())
        if (__atomic_load_n(latest, __ATOMIC_ACQUIRE) >= turn) return 1;
    for (uint64_t now; (now = __atomic_load_n(latest, __ATOMIC_ACQUIRE)) < turn;) {
        const struct timespec most = {0, NANOSECONDS};
        if (syscall(SYS_futex, latest, FUTEX_WAIT, (uint32_t)now, &most, NULL, 0) < 0 && errno != EAGAIN) return 0;
    }
    return 1;
}

/* Write this rank's `bytes` to its slot, unless it has entered the turn already, and wait for the slots of all ranks.
 * Returns 0 if one of them hasn't come yet: call again, with `entered`. */
static int exchange(char *memory, long rank, long ranks, const void *source, long bytes, long spins, long entered) {
    const uint64_t turn = *turn_of(memory, rank) + !entered;
    if (!entered) {
        memcpy(slot(memory, ranks, rank, turn), source, (size_t)bytes);
        __atomic_store_n(turn_of(memory, rank), turn, __ATOMIC_RELEASE);
        syscall(SYS_futex, turn_of(memory, rank), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    for (long other = 0; other < ranks; other++)
        if (!wait_for_rank(turn_of(memory, other), turn, spins)) return 0;
    return 1;
}

/* Replace x (count) by the sum over all ranks, in their order, so that it is the same on all. Returns as `exchange`. */
INLINE long sum_of_ranks(char *memory, long rank, long ranks, char *x, long count, long spins, long entered, int bf16) {
    const long size = bf16 ? 2 : 4, whole = count / LANES;
    if (!exchange(memory, rank, ranks, x, count * size, spins, entered)) return 0;
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

/* Copy the `bytes` of each rank to y, where two ranks' are `stride` bytes apart. Returns as `exchange`. */
long gather_of_ranks(char *memory, long rank, long ranks, const char *x, long bytes, char *y, long stride, long spins,
                     long entered, int threads) {
    (void)threads;
    if (!exchange(memory, rank, ranks, x, bytes, spins, entered)) return 0;
    for (long other = 0; other < ranks; other++)
        memcpy(y + other * stride, slot(memory, ranks, other, *turn_of(memory, rank)), (size_t)bytes);
    return 1;
}
