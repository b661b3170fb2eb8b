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

enum { SLOT = 1 << 18, NANOSECONDS = 20000000 };

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
 * Returns 0 if one of them hasn't come yet: call again, with what is then in `entered`. */
static int meet(char *memory, long rank, long ranks, const void *source, long bytes, long spins, int64_t *entered) {
    const uint64_t turn = *turn_of(memory, rank) + !*entered;
    if (!*entered) {
        memcpy(slot(memory, ranks, rank, turn), source, (size_t)bytes);
        __atomic_store_n(turn_of(memory, rank), turn, __ATOMIC_RELEASE);
        syscall(SYS_futex, turn_of(memory, rank), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    *entered = 1;
    for (long other = 0; other < ranks; other++)
        if (!wait_for_rank(turn_of(memory, other), turn, spins)) return 0;
    *entered = 0;
    return 1;
}

/* `meet` by one thread of the team, for which the others wait. */
static int exchange(char *memory, long rank, long ranks, const void *source, long bytes, long spins, int64_t *entered) {
#pragma omp master
    meet(memory, rank, ranks, source, bytes, spins, entered);
#pragma omp barrier
    return !*entered;
}

/* Replace x (count) by the sum over all ranks, in their order, so that it is the same on all. Returns as `exchange`. */
INLINE int sum_of_ranks(char *memory, long rank, long ranks, char *x, long count, long spins, int64_t *entered, int bf16) {
    const long size = bf16 ? 2 : 4, whole = count / LANES;
    if (!exchange(memory, rank, ranks, x, count * size, spins, entered)) return 0;
    const uint64_t turn = *turn_of(memory, rank);
#pragma omp for nowait
    for (long i = 0; i < whole; i++) {
        floats sum = load(slot(memory, ranks, 0, turn), i, bf16);
        for (long other = 1; other < ranks; other++) sum += load(slot(memory, ranks, other, turn), i, bf16);
        store(x, i, sum, bf16);
    }
#pragma omp for nowait
    for (long i = whole * LANES; i < count; i++) {
        float sum = get(slot(memory, ranks, 0, turn), i, bf16);
        for (long other = 1; other < ranks; other++) sum += get(slot(memory, ranks, other, turn), i, bf16);
        put(x, i, bf16, sum);
    }
    return 1;
}

/* memory, rank, ranks, x, count, spins, entered */
#define SUM_OF_RANKS(name, bf16) \
    KERNEL(name) { return sum_of_ranks(a[0].at, a[1].n, a[2].n, a[3].at, a[4].n, a[5].n, a[6].at, bf16); }
SUM_OF_RANKS(sum_of_ranks_float, 0)
SUM_OF_RANKS(sum_of_ranks_bf16, 1)

/* Copy the x of each rank, `rows` of `bytes` each, to y, where rows are `stride` bytes apart, and ranks `rank_stride`.
 * Returns as `exchange`. memory, rank, ranks, x, rows, bytes, y, stride, rank_stride, spins, entered */
KERNEL(gather_of_ranks) {
    char *memory = a[0].at, *y = a[6].at;
    const long ranks = a[2].n, rows = a[4].n, bytes = a[5].n;
    if (!exchange(memory, a[1].n, ranks, a[3].at, rows * bytes, a[9].n, a[10].at)) return 0;
    const uint64_t turn = *turn_of(memory, a[1].n);
#pragma omp for nowait
    for (long i = 0; i < ranks * rows; i++) {
        const long rank = i / rows, row = i % rows;
        memcpy(y + row * a[7].n + rank * a[8].n, slot(memory, ranks, rank, turn) + row * bytes, (size_t)bytes);
    }
    return 1;
}
