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
    double *gap;                 /* per node: idle time of its stage before it */
    double *settled_gap, *slack; /* the same, and what is left of the limit, when slack was settled last */
    Stage *stages;
    double length, total; /* iteration time without outside, and energy, of the last run */
    int32_t *undo; /* per node: its clock before the trial */
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

/* What the limit leaves each node, and the idle time before it, in the last run. */
static void settle_slack(Pipeline *p) {
    for (int32_t i = 0; i < p->num_nodes; i++) p->tail[i] = 0;
    for (int32_t i = p->num_nodes; i-- > 0;) {
        const int32_t node = p->order[i];
        const double to_end = p->duration[node] + p->tail[node];
        p->slack[node] = p->limit - p->start[node] - to_end;
        p->settled_gap[node] = p->gap[node];
        for (int32_t e = p->first_predecessor[node]; e < p->first_predecessor[node + 1]; e++) {
            double *tail = &p->tail[p->predecessor[e]];
            if (to_end + p->predecessor_latency[e] > *tail) *tail = to_end + p->predecessor_latency[e];
        }
    }
}

/* What another clock for a node changes: the time of it and of the node behind it, and what both cost; if the idle times
 * before them stay. */
typedef struct {
    int32_t behind;
    double time, time_behind, cost;
} Effect;

static Effect effect_of(const Pipeline *p, int32_t node, int32_t clock) {
    const int32_t next = behind(p, node), earlier = p->clock[before(p, node)], now = p->clock[node], later = p->clock[next];
    const double at_old = p->switch_latency - p->settled_gap[node], at_old_behind = p->switch_latency - p->settled_gap[next];
    double time, cost, new_time, new_cost, time_behind, cost_behind, new_time_behind, new_cost_behind;
    blend(p, p->type[node], earlier, now, at_old, &time, &cost);
    blend(p, p->type[node], earlier, clock, at_old, &new_time, &new_cost);
    blend(p, p->type[next], now, later, at_old_behind, &time_behind, &cost_behind);
    blend(p, p->type[next], clock, later, at_old_behind, &new_time_behind, &new_cost_behind);
    return (Effect){next, new_time - time, new_time_behind - time_behind, new_cost - cost + new_cost_behind - cost_behind};
}

static int is_allowed(const Pipeline *p, int32_t node, int32_t clock) {
    return clock != NONE && p->allowed[p->type[node] * p->num_clocks + clock];
}

/* What another clock for a node costs per second that it and the node behind it gain where they are late; infinite if they
 * gain nothing. */
static double price_of(const Pipeline *p, int32_t node, int32_t clock) {
    if (!is_allowed(p, node, clock)) return INFINITY;
    const Effect effect = effect_of(p, node, clock);
    const double gained = (p->slack[node] < 0 ? -effect.time : 0) + (p->slack[effect.behind] < 0 ? -effect.time_behind : 0);
    return gained > 0 ? effect.cost / gained : INFINITY;
}

/* Makes late nodes faster, or the nodes before them so that they need no change, at the least price; until the iteration is in
 * time or nothing is left to do. Every step makes a node faster, so it ends. */
static void repair(Pipeline *p) {
    for (run(p); p->length > p->limit; run(p)) {
        settle_slack(p);
        double least = INFINITY;
        int32_t chosen = NONE, chosen_clock = NONE;
        for (int32_t i = 0; i < p->num_nodes; i++) {
            if (p->slack[i] >= 0) continue;
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

/* Gives nodes begin .. end - 1 this clock. Keeps it and returns 1 if the iteration is then less late, or no later and by at
 * least a share of its energy cheaper. */
static int try_clock(Pipeline *p, int32_t begin, int32_t end, int32_t clock, double least_saving) {
    int32_t changed = 0;
    for (int32_t i = begin; i < end; i++) {
        if (!is_allowed(p, i, clock)) return 0;
        changed |= p->clock[i] != clock;
    }
    if (!changed || p->trials <= 0) return 0;
    p->trials--;
    const double late = fmax(0, p->length - p->limit), total = p->total, length = p->length;
    for (int32_t i = begin; i < end; i++) {
        p->undo[i] = p->clock[i];
        p->clock[i] = clock;
    }
    run(p);
    const double now_late = fmax(0, p->length - p->limit);
    if (now_late < late || (now_late == late && p->total <= total - least_saving * fabs(total))) {
        settle_slack(p);
        return 1;
    }
    for (int32_t i = begin; i < end; i++) p->clock[i] = p->undo[i];
    p->total = total;
    p->length = length;
    return 0;
}

static const double ANY = 0, SOME = 1e-12; /* shares of the energy to be saved at least */

/* `try_clock` for one node, if that seems to save energy and to fit. */
static int try_promising_clock(Pipeline *p, int32_t node, int32_t clock, double least_saving) {
    if (!is_allowed(p, node, clock)) return 0;
    const Effect effect = effect_of(p, node, clock);
    const int fits = effect.time <= fmax(0, p->slack[node]) && effect.time_behind <= fmax(0, p->slack[effect.behind]);
    if (effect.cost > 0 || !fits) return 0;
    return try_clock(p, node, node + 1, clock, least_saving);
}

/* Every run of equal clocks may take the clock of the run before or behind it, if only to spare a change, or the next
 * useful one, faster or slower; and so may every node. Until nothing helps. */
static void settle_clocks(Pipeline *p) {
    repair(p);
    settle_slack(p);
    for (int improved = 1; improved && p->trials > 0;) {
        improved = 0;
        for (int32_t s = 0; s < p->num_stages; s++) {
            const int32_t first = p->first_of_stage[s], last = p->first_of_stage[s + 1] - 1;
            for (int32_t begin = first, end; begin <= last; begin = end) {
                for (end = begin + 1; end <= last && p->clock[end] == p->clock[begin];) end++;
                if (end == begin + 1) continue;
                const int32_t *type = &p->type[begin], *clock = &p->clock[begin];
                improved |= try_clock(p, begin, end, p->clock[before(p, begin)], ANY);
                improved |= try_clock(p, begin, end, p->clock[behind(p, end - 1)], ANY);
                improved |= try_clock(p, begin, end, p->slower[*type * p->num_clocks + *clock], SOME);
                improved |= try_clock(p, begin, end, p->faster[*type * p->num_clocks + *clock], SOME);
            }
            for (int32_t i = first; i <= last; i++) {
                const int32_t *clock = &p->clock[i], *earlier = &p->clock[before(p, i)], *later = &p->clock[behind(p, i)];
                const double least_saving = *clock != *earlier && *clock != *later ? ANY : SOME;
                improved |= try_promising_clock(p, i, *earlier, least_saving);
                improved |= try_promising_clock(p, i, *later, least_saving);
                improved |= try_promising_clock(p, i, p->slower[p->type[i] * p->num_clocks + *clock], SOME);
                improved |= try_promising_clock(p, i, p->faster[p->type[i] * p->num_clocks + *clock], SOME);
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
        .gap = malloc(n * sizeof(double)), .settled_gap = malloc(n * sizeof(double)), .slack = malloc(n * sizeof(double)),
        .undo = malloc(n * sizeof(int32_t)), .stages = malloc(num_stages * sizeof(Stage)), .trials = trials,
    };
    PyObject *result = NULL;
    if (p.clock && p.end && p.duration && p.spent && p.start && p.tail && p.gap && p.settled_gap && p.slack && p.undo &&
        p.stages) {
        memcpy(p.clock, b[CLOCK].buf, n * sizeof(int32_t));
        Py_BEGIN_ALLOW_THREADS
        settle_clocks(&p);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("y#y#y#", p.clock, (Py_ssize_t)(n * sizeof(int32_t)), p.duration,
                               (Py_ssize_t)(n * sizeof(double)), p.spent, (Py_ssize_t)(n * sizeof(double)));
    } else
        PyErr_NoMemory();
    void *owned[] = {p.clock, p.end, p.duration, p.spent, p.start, p.tail, p.gap, p.settled_gap, p.slack, p.undo, p.stages};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    for (int i = 0; i < NUM_ARRAYS; i++) PyBuffer_Release(&b[i]);
    return result;
}
