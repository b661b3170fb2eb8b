/* Calls of kernels, one after another, by one team of threads: a whole decode step is one list of calls.
 *
 * Knows no kernel. cpu.py writes the lists.
 */

#include "vectors.h"

enum { ARGUMENTS = 17 };

typedef struct {
    Kernel *kernel;
    int64_t waits;  /* whether threads wait for each other before it, since it reads or writes what earlier calls did */
    Argument arguments[ARGUMENTS];
} Call;

/* Run calls until one isn't complete, or all are. Returns how many are. */
long run_calls(const Call *calls, long count, long threads) {
    long complete = 0;
#pragma omp parallel num_threads(threads)
    {
        long i = 0;
        for (; i < count; i++) {
            if (calls[i].waits) {
#pragma omp barrier
            }
            if (!calls[i].kernel(calls[i].arguments)) break;
        }
#pragma omp master
        complete = i;
    }
    return complete;
}
