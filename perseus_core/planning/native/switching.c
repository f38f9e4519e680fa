/* What really happens when changes of clock take time.
 *
 * The clock for the node behind is asked for a latency before the node on the GPU ends, so that it is in force at the
 * boundary; never before the last change is in force and its call has returned, nor before the stage has begun the iteration: until then nobody knows
 * when its nodes will end. Where a GPU cannot be as quick as that, it asks as soon as it may, and
 * for the clock wanted by the time that this one is in force: what was wanted in between never comes. An instruction progresses
 * at the speed of the clock in force, and draws its power. */
#include "switching.h"

#include <math.h>

/* The search passes over a plan that takes longer to become steady; a given one is run so often at most. */
enum { SOON = 4, MOST_ITERATIONS = 64 };

static void take_effect(Gpu *gpu) {
    gpu->clock = gpu->pending[0].clock;
    gpu->pending[0] = gpu->pending[1];
    gpu->num_pending--;
}

static void let_take_effect(Gpu *gpu, double now) {
    while (gpu->num_pending && gpu->pending[0].at <= now) take_effect(gpu);
}

/* The clock that was asked for last, `skipped` of those that are pending left out. */
static int32_t newest_clock(const Gpu *gpu, int32_t skipped) {
    const int32_t kept = gpu->num_pending - skipped;
    return kept ? gpu->pending[kept - 1].clock : gpu->clock;
}

static double latency_to(const Pipeline *p, int32_t from, int32_t to) { return to > from ? p->latency.up : p->latency.down; }

/* How long before a node's end, if nothing changed, it is asked for: a rise early, so that the node's last moments run at it
 * and it ends sooner; a fall late, but before what follows has begun. */
static double lead_to(const Pipeline *p, const Gpu *gpu, const double *time, int32_t wanted) {
    if (wanted < newest_clock(gpu, 0)) return fmax(0, p->latency.down - p->latency.jitter);
    return p->latency.up + p->latency.jitter * fmax(1, time[gpu->clock] / time[wanted]);
}

static Change change_to(const Pipeline *p, Gpu *gpu, double asked, int32_t from, int32_t to) {
    const double latency = latency_to(p, from, to);
    gpu->free_at = asked + fmax(latency, p->latency.call);
    return (Change){asked, asked + latency, to};
}

/* Asks for the clock that is wanted when a node ends, when it may, but no sooner than its stage's first node began. */
static void ask(const Pipeline *p, Gpu *gpu, const double *time, double began, double end, int32_t wanted) {
    const int32_t newest = newest_clock(gpu, 0);
    if (wanted == newest) return;
    double asked = fmax(began, end - lead_to(p, gpu, time, wanted));
    if (gpu->num_pending) {
        Change *last = &gpu->pending[gpu->num_pending - 1];
        if (last->at >= end && asked <= last->asked) { /* it was still to be asked for, so this one is in its place */
            const int32_t earlier = newest_clock(gpu, 1);
            if (wanted == earlier) {
                gpu->num_pending--;
                gpu->free_at = last->asked;
            } else
                *last = change_to(p, gpu, last->asked, earlier, wanted);
            return;
        }
        if (gpu->num_pending == 2) take_effect(gpu); /* in force before another may be asked for */
    }
    if (asked < gpu->free_at) asked = gpu->free_at;
    gpu->pending[gpu->num_pending++] = change_to(p, gpu, asked, newest, wanted);
}

static void run_node(Pipeline *p, int32_t node, double start, Gpu *gpu) {
    const double *time = p->time + p->type[node] * p->num_clocks, *cost = p->cost + p->type[node] * p->num_clocks;
    let_take_effect(gpu, start);
    p->gpu_before[node] = *gpu;
    const int32_t first = p->first_node[p->stage[node]];
    const double began = node == first ? start : p->end[first] - p->duration[first];
    double now = start, left = 1, spent = 0;
    int has_asked = 0;
    for (;;) {
        const double end = now + left * time[gpu->clock];
        if (!gpu->num_pending || gpu->pending[0].at >= end) {
            if (!has_asked) { /* which may bring a change before the end */
                ask(p, gpu, time, began, end, p->clock[p->behind[node]]);
                has_asked = 1;
                if (gpu->num_pending && gpu->pending[0].at < end) continue;
            }
            p->end[node] = end;
            p->spent[node] = spent + left * cost[gpu->clock];
            break;
        }
        const double until = fmax(now, gpu->pending[0].at), done = (until - now) / time[gpu->clock];
        spent += done * cost[gpu->clock];
        left -= done;
        now = until;
        take_effect(gpu);
    }
    p->duration[node] = p->end[node] - start;
}

/* The GPUs as they are when this node begins; where none of theirs begins later, as they are at the end. */
static void go_back_to(Pipeline *p, int32_t node) {
    memset(p->is_found, 0, (size_t)p->num_stages);
    int32_t num_found = 0;
    for (int32_t i = node; i < p->num_nodes && num_found < p->num_stages; i++) {
        const int32_t s = p->stage[i];
        if (p->is_found[s]) continue;
        p->is_found[s] = 1;
        num_found++;
        p->last[s] = i == p->first_node[s] ? p->first[s] : p->gpu_before[i];
    }
}

/* Returns the first node that was not run, because it is certain that the limit is not kept. */
static int32_t run_from(Pipeline *p, int32_t node, double limit) {
    go_back_to(p, node);
    double length = node ? p->length_to[node - 1] : 0, total = node ? p->total_to[node - 1] : 0;
    for (int32_t i = node; i < p->num_nodes; i++) {
        double start = 0;
        for (int32_t e = p->first_predecessor[i]; e < p->first_predecessor[i + 1]; e++) {
            const double ready = p->end[p->predecessor[e]] + p->predecessor_latency[e];
            if (ready > start) start = ready;
        }
        run_node(p, i, start, &p->last[p->stage[i]]);
        p->length_to[i] = length = fmax(length, p->end[i]);
        p->total_to[i] = total += p->spent[i];
        if (p->end[i] + p->least_tail[i] > limit) return i + 1;
    }
    return p->num_nodes;
}

/* Lets the next iteration begin as this one ended; returns whether that makes a difference to it. */
static int go_on(Pipeline *p) {
    const double until_next = length_of(p) + p->outside, tiny = 1e-12 * until_next;
    const double earliest_asked = -fmax(p->latency.up, p->latency.down) - p->latency.jitter;
    int differs = 0;
    for (int32_t s = 0; s < p->num_stages; s++) {
        Gpu now = p->last[s];
        const int32_t node = p->first_node[s];
        const Gpu *then = &p->gpu_before[node];
        for (int i = 0; i < now.num_pending; i++) {
            now.pending[i].asked -= until_next;
            now.pending[i].at -= until_next;
        }
        now.free_at = fmax(now.free_at - until_next, earliest_asked);
        p->first[s] = now;
        let_take_effect(&now, p->end[node] - p->duration[node]);
        differs |= now.clock != then->clock || now.num_pending != then->num_pending ||
                   fabs(now.free_at - then->free_at) > tiny;
        for (int i = 0; i < now.num_pending && !differs; i++)
            differs |= now.pending[i].clock != then->pending[i].clock || fabs(now.pending[i].at - then->pending[i].at) > tiny;
    }
    return differs;
}

void settle_least_tails(Pipeline *p) {
    for (int32_t i = 0; i < p->num_nodes; i++) p->least_tail[i] = 0;
    for (int32_t i = p->num_nodes; i-- > 0;) {
        double least = INFINITY;
        for (int32_t c = 0; c < p->num_clocks; c++) least = fmin(least, p->time[p->type[i] * p->num_clocks + c]);
        for (int32_t e = p->first_predecessor[i]; e < p->first_predecessor[i + 1]; e++) {
            double *tail = &p->least_tail[p->predecessor[e]];
            *tail = fmax(*tail, p->predecessor_latency[e] + least + p->least_tail[i]);
        }
    }
}

Rerun run_steadily(Pipeline *p, int32_t node, double limit) {
    Rerun rerun = {.begin = node, .end = run_from(p, node, limit)};
    rerun.is_given_up = rerun.end < p->num_nodes;
    for (int i = 1; !rerun.is_given_up && go_on(p); i++) {
        rerun.begin = 0;
        rerun.is_given_up = i == SOON || run_from(p, 0, limit) < p->num_nodes;
    }
    return rerun;
}

void run_until_steady(Pipeline *p) {
    double longest = 0;
    run_from(p, 0, INFINITY);
    for (int i = 1; go_on(p); i++) {
        run_from(p, 0, INFINITY);
        if (i > MOST_ITERATIONS / 2 && length_of(p) > longest) {
            longest = length_of(p);
            memcpy(p->first_of_longest, p->first, (size_t)p->num_stages * sizeof *p->first);
        }
        if (i == MOST_ITERATIONS) {
            memcpy(p->first, p->first_of_longest, (size_t)p->num_stages * sizeof *p->first);
            run_from(p, 0, INFINITY);
            return;
        }
    }
}
