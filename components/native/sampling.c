/* The next token of each row of logits, as zoo/engine/sampler.py defines it, without sorting all of them.
 *
 * Where a filter keeps the likeliest tokens, those of about equal logits are counted and weighed together. Sorted are only
 * the few such groups in which something is looked for.
 */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(ZOO_PLAIN)

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "numbers.h"

enum { GROUPS = 2048, BLOCK = 128 };

/* So many temperatures below the likeliest logit a weight is 0 in float32: all such tokens are of one group. */
static const float FAR = 104;

typedef struct {
    float logit;
    int32_t id;
} token;

/* A row of logits. scale: groups per difference from the best. counts, masses: the tokens of each group and their weights.
 * sorted: the tokens of the group that was opened last, the likeliest first. */
typedef struct {
    long vocabulary;
    const float *logits;
    float best, temperature, scale;
    int counts[GROUPS], opened;
    double masses[GROUPS];
    token *sorted;
} row;

/* Relative to the likeliest token's: no temperature can overflow them. */
AVX512 INLINE __m512 weights(const row *of, __m512 logits) {
    return exponential(_mm512_div_ps(_mm512_sub_ps(logits, _mm512_set1_ps(of->best)), _mm512_set1_ps(of->temperature)));
}

AVX512 static float weight(const row *of, float logit) { return _mm512_cvtss_f32(weights(of, _mm512_set1_ps(logit))); }

/* One of them in any case: beside what is not a number the best is not always found. */
AVX512 INLINE __m512i groups(const row *of, __m512 logits) {
    __m512 below = _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(of->best), logits), _mm512_set1_ps(of->scale));
    return _mm512_cvttps_epi32(_mm512_min_ps(_mm512_max_ps(below, _mm512_setzero_ps()), _mm512_set1_ps(GROUPS - 1)));
}

AVX512 static void find_best(row *of) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (long i = 0; i < of->vocabulary; i += 16) {
        __mmask16 part = part_of(of->vocabulary - i);
        most = _mm512_mask_max_ps(most, part, most, _mm512_maskz_loadu_ps(part, of->logits + i));
    }
    of->best = _mm512_reduce_max_ps(most);
}

/* The first of the likeliest tokens. */
AVX512 static long first_best(const row *of) {
    for (long i = 0; i < of->vocabulary; i += 16) {
        __mmask16 part = part_of(of->vocabulary - i);
        __m512 logits = _mm512_maskz_loadu_ps(part, of->logits + i);
        __mmask16 found = _mm512_mask_cmp_ps_mask(part, logits, _mm512_set1_ps(of->best), _CMP_EQ_OQ);
        if (found) return i + __builtin_ctz(found);
    }
    return 0;
}

AVX512 static double block_weight(const row *of, long first) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = first; i < first + BLOCK && i < of->vocabulary; i += 16) {
        __mmask16 part = part_of(of->vocabulary - i);
        sum = _mm512_add_ps(sum, _mm512_maskz_mov_ps(part, weights(of, _mm512_maskz_loadu_ps(part, of->logits + i))));
    }
    return _mm512_reduce_add_ps(sum);
}

/* By the distribution in the order of ids: first the block in which the number falls, then the token. */
static long of_all(const row *of, double uniform) {
    double total = 0, before = 0, more;
    long first = 0, found = 0;
    for (long i = 0; i < of->vocabulary; i += BLOCK) total += block_weight(of, i);
    while (before + (more = block_weight(of, first)) <= uniform * total && first + BLOCK < of->vocabulary)
        before += more, first += BLOCK;
    /* The two sums round differently: the token is one of the block, and one that has weight. */
    for (long i = first; i < first + BLOCK && i < of->vocabulary && before <= uniform * total; i++) {
        float own = weight(of, of->logits[i]);
        if (own > 0) found = i;
        before += own;
    }
    return found;
}

/* Puts the tokens into groups. Returns how many of them weigh at least min_p. */
AVX512 static long group(row *of, double min_p) {
    __m512 least = _mm512_set1_ps(of->best);
    for (long i = 0; i < of->vocabulary; i += 16) {
        __mmask16 part = part_of(of->vocabulary - i);
        least = _mm512_mask_min_ps(least, part, least, _mm512_maskz_loadu_ps(part, of->logits + i));
    }
    float range = fminf(of->best - _mm512_reduce_min_ps(least), FAR * of->temperature);
    of->scale = range > 0 ? fminf((GROUPS - 1) / range, FLT_MAX) : FLT_MAX;
    memset(of->counts, 0, sizeof of->counts), memset(of->masses, 0, sizeof of->masses);
    of->opened = -1;
    long heavy = 0;
    for (long i = 0; i < of->vocabulary; i += 16) {
        long some = of->vocabulary - i < 16 ? of->vocabulary - i : 16;
        __m512 logits = _mm512_maskz_loadu_ps(part_of(some), of->logits + i);
        int at[16];
        float own[16];
        _mm512_storeu_si512(at, groups(of, logits)), _mm512_storeu_ps(own, weights(of, logits));
        for (long k = 0; k < some; k++) of->counts[at[k]]++, of->masses[at[k]] += own[k], heavy += own[k] >= min_p;
    }
    return heavy;
}

static int likelier(const void *a, const void *b) {
    const token *one = a, *other = b;
    if (one->logit != other->logit) return one->logit > other->logit ? -1 : 1;
    return (one->id > other->id) - (one->id < other->id);
}

AVX512 static void open_group(row *of, int number) {
    if (of->opened == number) return;
    of->opened = number;
    long count = 0;
    for (long i = 0; i < of->vocabulary; i += 16) {
        __mmask16 part = part_of(of->vocabulary - i);
        __m512i found = groups(of, _mm512_maskz_loadu_ps(part, of->logits + i));
        unsigned own = _mm512_mask_cmpeq_epi32_mask(part, found, _mm512_set1_epi32(number));
        for (; own; own &= own - 1) {
            long id = i + __builtin_ctz(own);
            of->sorted[count++] = (token){of->logits[id], id};
        }
    }
    qsort(of->sorted, count, sizeof(token), likelier);
}

/* Of how many of the likeliest tokens the weights come to a sum, or, `beyond`, to more. */
static long reaching(row *of, double sum, int beyond) {
    double before = 0, after;
    long count = 0;
    int n = 0;
    for (; n < GROUPS - 1 && (after = before + of->masses[n], beyond ? after <= sum : after < sum); n++)
        before = after, count += of->counts[n];
    open_group(of, n);
    for (int i = 0; i < of->counts[n] && (beyond ? before <= sum : before < sum); i++, count++)
        before += weight(of, of->sorted[i].logit);
    return count;
}

/* The group that holds the likeliest tokens' number `left`, from 0, which becomes its number in the group. before: what all
 * groups before it weigh. */
static int holder(const row *of, long *left, double *before) {
    int n = 0;
    for (*before = 0; n < GROUPS - 1 && *left >= of->counts[n]; n++) *left -= of->counts[n], *before += of->masses[n];
    return n;
}

/* What the `count` likeliest tokens weigh. */
static double weight_of(row *of, long count) {
    double sum;
    int n = holder(of, &count, &sum);
    if (count == of->counts[n]) return sum + of->masses[n];
    if (!count || !(of->masses[n] > 0)) return sum;
    open_group(of, n);
    for (long i = 0; i < count; i++) sum += weight(of, of->sorted[i].logit);
    return sum;
}

static long between(long least, long most, long value) { return value < least ? least : value > most ? most : value; }

/* Each filter keeps a beginning of the tokens, the likeliest first, so all of them together keep the shortest. */
static long filtered(row *of, double top_k, double top_p, double min_p, double uniform) {
    long heavy = group(of, min_p), kept = between(1, of->vocabulary, fmin(top_k, of->vocabulary));
    if (top_p < 1) kept = between(1, kept, reaching(of, top_p * weight_of(of, kept), 0));
    kept = between(1, kept, heavy);
    long place = between(0, kept - 1, reaching(of, uniform * weight_of(of, kept), 1) - 1);
    double before;
    int n = holder(of, &place, &before);
    open_group(of, n);
    return of->sorted[place].id;
}

/* tokens (rows): of logits, `next` apart. settings (5, rows): temperature, 0 for the likeliest token; top_k, infinite
 * for all; top_p; min_p; the uniform number. NULL where all take the likeliest. room: for `vocabulary` tokens of
 * each thread. What is not finite gives any token. */
void zoo_draw(long rows, long vocabulary, const float *logits, long next, const double *settings, int64_t *tokens, void *room,
              int threads) {
    if (!rows) return;
#pragma omp parallel for schedule(static) num_threads(rows < threads ? rows : threads)
    for (long r = 0; r < rows; r++) {
        row own = {.vocabulary = vocabulary, .logits = logits + r * next};
        double option[5] = {0};
        for (int i = 0; settings && i < 5; i++) option[i] = settings[i * rows + r];
        find_best(&own);
        own.temperature = fmax(option[0], 1e-30);
        own.sorted = (token *)room + omp_get_thread_num() * vocabulary;
        if (option[0] == 0)
            tokens[r] = first_best(&own);
        else if (option[1] < INFINITY || option[2] < 1 || option[3] > 0)
            tokens[r] = filtered(&own, option[1], option[2], option[3], option[4]);
        else
            tokens[r] = of_all(&own, option[4]);
    }
}

#endif
