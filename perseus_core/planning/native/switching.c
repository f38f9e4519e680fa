/* Plans when a change of clock takes time: what really happens, and a search for the changes worth their while.
 *
 * The clock for an instruction is asked for when the instruction before it on its stage ends, and is in force a latency
 * later; asking for another clock in the meantime replaces the change under way. An instruction that starts before its
 * clock is in force begins at the old clock: it progresses at that clock's speed and draws that clock's power. An
 * iteration follows another like it: two are run, the second counts.
 *
 * A late plan is repaired: late instructions, or those before them, become faster at the least price per second. Then
 * runs of equal clocks and single instructions try other clocks, and keep what saves energy and is in time. */
#include "native.h"

#include <math.h>

typedef struct {
    int32_t in_force, asked; /* clocks */
    double change_s, free_s; /* when the asked one is in force; when the last instruction ended */
} Stage;

typedef struct {
    int32_t num_nodes, num_stages, num_clocks;
    const int32_t *order; /* nodes in topological order */
    const int32_t *first_predecessor, *predecessor;
    const double *predecessor_latency;
    const int32_t *stage_of, *first_of_stage, *type; /* nodes of a stage are consecutive, in its order */
    const double *time, *cost;     /* per type and clock */
    const int32_t *faster, *slower; /* per type and clock: the next useful clock, or NONE */
    const uint8_t *allowed;        /* per type and clock */
    double switch_latency, outside, waiting_power, limit;
    int32_t *clock; /* per node */
    double *start, *end, *duration, *spent, *tail;
    double *gap; /* per node: idle time of its stage before it */
    Stage *stages;
    double length, total; /* iteration time without outside, and energy, of the last run */
    int64_t trials;
} Pipeline;

/* Time and cost of an instruction that begins at the old clock and goes on at the wanted one after `at_old` seconds. */
static void blend(const Pipeline *p, int32_t type, int32_t old, int32_t wanted, double at_old, double *time, double *cost) {
    const double *time_at = p->time + type * p->num_clocks, *cost_at = p->cost + type * p->num_clocks;
    if (old == wanted || at_old <= 0) {
        *time = time_at[wanted];
        *cost = cost_at[wanted];
    } else if (at_old >= time_at[old]) {
        *time = time_at[old];
        *cost = cost_at[old];
    } else {
        const double share = at_old / time_at[old];
        *time = at_old + (1 - share) * time_at[wanted];
        *cost = share * cost_at[old] + (1 - share) * cost_at[wanted];
    }
}

static void run_node(Pipeline *p, int32_t node, double start) {
    Stage *stage = &p->stages[p->stage_of[node]];
    const int32_t wanted = p->clock[node];
    if (stage->change_s <= stage->free_s) stage->in_force = stage->asked;
    if (wanted != stage->asked) {
        stage->asked = wanted;
        stage->change_s = stage->free_s + p->switch_latency;
    }
    blend(p, p->type[node], stage->in_force, wanted, stage->change_s - start, &p->duration[node], &p->spent[node]);
    p->gap[node] = start - stage->free_s;
    p->start[node] = start;
    p->end[node] = stage->free_s = start + p->duration[node];
    if (stage->change_s <= stage->free_s) stage->in_force = wanted;
}

static void run_iteration(Pipeline *p) {
    p->length = p->total = 0;
    for (int32_t i = 0; i < p->num_nodes; i++) {
        const int32_t node = p->order[i];
        double start = 0;
        for (int32_t e = p->first_predecessor[node]; e < p->first_predecessor[node + 1]; e++) {
            const double ready = p->end[p->predecessor[e]] + p->predecessor_latency[e];
            if (ready > start) start = ready;
        }
        run_node(p, node, start);
        if (p->end[node] > p->length) p->length = p->end[node];
        p->total += p->spent[node];
    }
    p->total += p->waiting_power * p->length;
}

static void run(Pipeline *p) {
    for (int32_t s = 0; s < p->num_stages; s++) {
        const int32_t first = p->clock[p->first_of_stage[s]];
        p->stages[s] = (Stage){.in_force = first, .asked = first};
    }
    run_iteration(p);
    for (int32_t s = 0; s < p->num_stages; s++) {
        p->stages[s].change_s -= p->length + p->outside;
        p->stages[s].free_s -= p->length + p->outside;
    }
    run_iteration(p);
}

static int32_t before(const Pipeline *p, int32_t node) {
    const int32_t stage = p->stage_of[node];
    return node == p->first_of_stage[stage] ? p->first_of_stage[stage + 1] - 1 : node - 1;
}

static int32_t behind(const Pipeline *p, int32_t node) {
    const int32_t stage = p->stage_of[node];
    return node == p->first_of_stage[stage + 1] - 1 ? p->first_of_stage[stage] : node + 1;
}

/* Longest paths from the end of each node, at the durations of the last run. */
static void settle_tails(Pipeline *p) {
    for (int32_t i = 0; i < p->num_nodes; i++) p->tail[i] = 0;
    for (int32_t i = p->num_nodes; i-- > 0;) {
        const int32_t node = p->order[i];
        for (int32_t e = p->first_predecessor[node]; e < p->first_predecessor[node + 1]; e++) {
            const double tail = p->tail[node] + p->duration[node] + p->predecessor_latency[e];
            if (tail > p->tail[p->predecessor[e]]) p->tail[p->predecessor[e]] = tail;
        }
    }
}

static int is_late(const Pipeline *p, int32_t node) { return p->start[node] + p->duration[node] + p->tail[node] > p->limit; }

/* What another clock for a node costs per second that it and the node behind it gain where they are late, gaps staying as they
 * are; infinite if they gain nothing. */
static double price_of(const Pipeline *p, int32_t node, int32_t clock) {
    if (clock == NONE || !p->allowed[p->type[node] * p->num_clocks + clock]) return INFINITY;
    const int32_t nodes[] = {node, behind(p, node)}, old_before[] = {p->clock[before(p, node)], p->clock[node]};
    double gained = 0, paid = 0;
    for (int k = 0; k < 2; k++) {
        const int32_t type = p->type[nodes[k]];
        const int32_t new_before = k ? clock : old_before[k], new_clock = k ? p->clock[nodes[k]] : clock;
        const double at_old = p->switch_latency - p->gap[nodes[k]];
        double time, cost, new_time, new_cost;
        blend(p, type, old_before[k], p->clock[nodes[k]], at_old, &time, &cost);
        blend(p, type, new_before, new_clock, at_old, &new_time, &new_cost);
        paid += new_cost - cost;
        if (is_late(p, nodes[k])) gained += time - new_time;
    }
    return gained > 0 ? paid / gained : INFINITY;
}

/* Makes late nodes faster, or the nodes before them so that they need no change, at the least price; until the iteration is in
 * time or nothing is left to do. Every step makes a node faster, so it ends. */
static void repair(Pipeline *p) {
    for (run(p); p->length > p->limit; run(p)) {
        settle_tails(p);
        double least = INFINITY;
        int32_t chosen = NONE, chosen_clock = NONE;
        for (int32_t i = 0; i < p->num_nodes; i++) {
            if (!is_late(p, i)) continue;
            const int32_t b = before(p, i);
            const double *time = p->time + p->type[b] * p->num_clocks;
            const int32_t faster = p->faster[p->type[i] * p->num_clocks + p->clock[i]];
            const double price = price_of(p, i, faster);
            const double price_before = time[p->clock[i]] < time[p->clock[b]] ? price_of(p, b, p->clock[i]) : INFINITY;
            if (price < least) {
                least = price;
                chosen = i;
                chosen_clock = faster;
            }
            if (price_before < least) {
                least = price_before;
                chosen = b;
                chosen_clock = p->clock[i];
            }
        }
        if (chosen == NONE) return;
        p->clock[chosen] = chosen_clock;
    }
}

/* Gives nodes begin .. end - 1 this clock. Keeps it and returns 1 if the iteration is then less late, or as late and cheaper. */
static int try_clock(Pipeline *p, int32_t begin, int32_t end, int32_t clock, int32_t *undo) {
    if (clock == NONE) return 0;
    int32_t changed = 0;
    for (int32_t i = begin; i < end; i++) {
        if (!p->allowed[p->type[i] * p->num_clocks + clock]) return 0;
        changed |= p->clock[i] != clock;
    }
    if (!changed || p->trials <= 0) return 0;
    p->trials--;
    const double late = p->length > p->limit ? p->length - p->limit : 0, total = p->total, length = p->length;
    for (int32_t i = begin; i < end; i++) {
        undo[i] = p->clock[i];
        p->clock[i] = clock;
    }
    run(p);
    const double now_late = p->length > p->limit ? p->length - p->limit : 0;
    if (now_late < late || (now_late == late && p->total < total - 1e-12 * (total < 0 ? -total : total))) return 1;
    for (int32_t i = begin; i < end; i++) p->clock[i] = undo[i];
    p->total = total;
    p->length = length;
    return 0;
}

/* Every run of equal clocks may take the clock of the run before or behind it, every node that of its neighbours or the
 * next useful one, faster or slower; until nothing helps. */
static void settle_clocks(Pipeline *p, int32_t *undo) {
    repair(p);
    for (int improved = 1; improved && p->trials > 0;) {
        improved = 0;
        for (int32_t s = 0; s < p->num_stages; s++) {
            const int32_t first = p->first_of_stage[s], last = p->first_of_stage[s + 1] - 1;
            for (int32_t begin = first, end; begin <= last; begin = end) {
                for (end = begin + 1; end <= last && p->clock[end] == p->clock[begin];) end++;
                improved |= try_clock(p, begin, end, p->clock[begin == first ? last : begin - 1], undo);
                improved |= try_clock(p, begin, end, p->clock[end > last ? first : end], undo);
            }
            for (int32_t i = first; i <= last; i++) {
                improved |= try_clock(p, i, i + 1, p->clock[i == first ? last : i - 1], undo);
                improved |= try_clock(p, i, i + 1, p->clock[i == last ? first : i + 1], undo);
                improved |= try_clock(p, i, i + 1, p->slower[p->type[i] * p->num_clocks + p->clock[i]], undo);
                improved |= try_clock(p, i, i + 1, p->faster[p->type[i] * p->num_clocks + p->clock[i]], undo);
            }
        }
    }
    run(p);
}

const char run_with_switching_doc[] =
    "run_with_switching(order, first_predecessor, predecessor, predecessor_latency, stage_of, first_of_stage, type, time, cost,\n"
    "                   faster, slower, allowed, clock, switch_latency, outside, waiting_power, limit, trials, /)\n\n"
    "Runs an iteration in which changes of clock take time, once it is repaired if it takes longer than `limit`, and once\n"
    "better clocks have been searched for in so many trials.\n\n"
    "time, cost, faster, slower, allowed: per type and clock. clock: per node, a number of a clock.\n"
    "Returns clocks (int32 bytes), durations and costs (float64 bytes).";

PyObject *run_with_switching(PyObject *module, PyObject *args) {
    (void)module;
    enum { ORDER, FIRST_PREDECESSOR, PREDECESSOR, PREDECESSOR_LATENCY, STAGE_OF, FIRST_OF_STAGE, TYPE, TIME, COST, FASTER, SLOWER,
           ALLOWED, CLOCK, NUM_ARRAYS };
    Py_buffer b[NUM_ARRAYS];
    double switch_latency, outside, waiting_power, limit;
    long long trials;
    int num_clocks;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*y*y*y*y*y*y*iddddL", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7], &b[8],
                          &b[9], &b[10], &b[11], &b[12], &num_clocks, &switch_latency, &outside, &waiting_power, &limit, &trials))
        return NULL;
    const size_t n = (size_t)b[CLOCK].len / sizeof(int32_t), num_stages = (size_t)b[FIRST_OF_STAGE].len / sizeof(int32_t) - 1;
    Pipeline p = {
        .num_nodes = (int32_t)n, .num_stages = (int32_t)num_stages, .num_clocks = num_clocks, .order = b[ORDER].buf,
        .first_predecessor = b[FIRST_PREDECESSOR].buf, .predecessor = b[PREDECESSOR].buf,
        .predecessor_latency = b[PREDECESSOR_LATENCY].buf, .stage_of = b[STAGE_OF].buf,
        .first_of_stage = b[FIRST_OF_STAGE].buf, .type = b[TYPE].buf, .time = b[TIME].buf, .cost = b[COST].buf,
        .faster = b[FASTER].buf, .slower = b[SLOWER].buf, .allowed = b[ALLOWED].buf,
        .switch_latency = switch_latency, .outside = outside, .waiting_power = waiting_power, .limit = limit,
        .clock = malloc(n * sizeof(int32_t)), .end = malloc(n * sizeof(double)), .duration = malloc(n * sizeof(double)),
        .spent = malloc(n * sizeof(double)), .start = malloc(n * sizeof(double)), .tail = malloc(n * sizeof(double)),
        .gap = malloc(n * sizeof(double)), .stages = malloc(num_stages * sizeof(Stage)), .trials = trials,
    };
    int32_t *undo = malloc(n * sizeof(int32_t));
    PyObject *result = NULL;
    if (p.clock && p.end && p.duration && p.spent && p.start && p.tail && p.gap && p.stages && undo) {
        memcpy(p.clock, b[CLOCK].buf, n * sizeof(int32_t));
        Py_BEGIN_ALLOW_THREADS
        settle_clocks(&p, undo);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("y#y#y#", p.clock, (Py_ssize_t)(n * sizeof(int32_t)), p.duration,
                               (Py_ssize_t)(n * sizeof(double)), p.spent, (Py_ssize_t)(n * sizeof(double)));
    } else
        PyErr_NoMemory();
    void *owned[] = {p.clock, p.end, p.duration, p.spent, p.start, p.tail, p.gap, p.stages, undo};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    for (int i = 0; i < NUM_ARRAYS; i++) PyBuffer_Release(&b[i]);
    return result;
}
