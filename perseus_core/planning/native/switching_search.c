/* Clocks that save most when changes of clock take time: simulated annealing (Kirkpatrick, Gelatt and Vecchi 1983).
 *
 * A move gives a run of equal clocks of one stage, or a part of it, another clock, or shifts where it begins or ends; perhaps
 * together with another such move. A move that makes a late iteration later, or one in time late, is undone; else it is kept if
 * it saves, and by chance if it does not, the less likely the later. A stage may have more changes than allowed at first, at
 * a price that rises until they are gone. Random numbers are always the same: equal input, equal plan. */
#include "switching.h"

#include <math.h>

enum { MOST_PARTS = 2 };

/* In energies of an instruction, on average: what a change costs, so that none is made for nothing; what a change too many costs
 * in the end; by how much a kept move may cost more, on average, in the end. */
static const double PRICE_OF_CHANGE = 2e-4, PRICE_OF_EXCESS = 4, COLD = 4e-4;

/* A part of a stage's order that is to get one clock. */
typedef struct {
    int32_t stage, begin, end, clock;
} Part;

typedef struct {
    int32_t node, clock;
} Undo;

typedef struct {
    Pipeline p, kept;       /* as tried, and as it was before */
    const uint8_t *measured; /* per type and clock */
    const int32_t *order, *begin_of_stage; /* nodes stage by stage; where each stage begins, and the last one ends */
    double limit;
    double max_changes_per_s; /* of a stage */
    int32_t *num_changes;   /* per stage */
    double excess_price, change_price;
    Undo *undo;
    int32_t num_undo, from; /* clocks to be put back; the first node that may have changed */
    int32_t num_steps;      /* clocks are stepped by 1, 2, 4, ...: so many of these */
    int32_t *best;          /* per node: its clock in the best plan */
    double best_late, best_energy;
    uint64_t random_state;
} Search;

/* Sums of the same times in another order differ by less than this share. */
static const double ROUNDING_ERROR = 1e-12;

static const uint64_t SEED = 0x9E3779B97F4A7C15;

static uint64_t random_bits(Search *s) {
    s->random_state ^= s->random_state << 13;
    s->random_state ^= s->random_state >> 7;
    s->random_state ^= s->random_state << 17;
    return s->random_state;
}

static int32_t random_below(Search *s, int32_t n) { return (int32_t)((random_bits(s) >> 33) % (uint64_t)n); }

static double random_share(Search *s) { return (double)(random_bits(s) >> 11) * 0x1p-53; }

/* What is known of nodes begin .. end - 1. */
static void copy(Pipeline *to, const Pipeline *from, int32_t begin, int32_t end) {
    const size_t n = (size_t)(end - begin);
    memcpy(to->end + begin, from->end + begin, n * sizeof *to->end);
    memcpy(to->duration + begin, from->duration + begin, n * sizeof *to->duration);
    memcpy(to->spent + begin, from->spent + begin, n * sizeof *to->spent);
    memcpy(to->length_to + begin, from->length_to + begin, n * sizeof *to->length_to);
    memcpy(to->total_to + begin, from->total_to + begin, n * sizeof *to->total_to);
    memcpy(to->gpu_before + begin, from->gpu_before + begin, n * sizeof *to->gpu_before);
    memcpy(to->first, from->first, (size_t)from->num_stages * sizeof *to->first);
    memcpy(to->last, from->last, (size_t)from->num_stages * sizeof *to->last);
}

static double late_by(const Search *s) { return fmax(0, length_of(&s->p) - s->limit); }

/* What is meant by 10 changes in 0.3 s is 3. */
static double most_changes(double per_s, double time) { return floor(per_s * time * (1 + 1e-9)); }

/* Changes of an iteration on one stage, the one to the next iteration's first clock included. */
static int32_t count_changes(const Search *s, int32_t stage) {
    const int32_t begin = s->begin_of_stage[stage], end = s->begin_of_stage[stage + 1];
    int32_t count = 0, earlier = s->p.clock[s->order[end - 1]];
    for (int32_t i = begin; i < end; i++) {
        const int32_t clock = s->p.clock[s->order[i]];
        count += clock != earlier;
        earlier = clock;
    }
    return count;
}

/* Changes of all stages, and how many of them are too many for an iteration of this length. */
static int32_t all_changes(const Search *s, int32_t *excess) {
    const double most = most_changes(s->max_changes_per_s, length_of(&s->p) + s->p.outside);
    int32_t sum = 0;
    *excess = 0;
    for (int32_t stage = 0; stage < s->p.num_stages; stage++) {
        sum += s->num_changes[stage];
        if (s->num_changes[stage] > most) *excess += s->num_changes[stage] - (int32_t)most;
    }
    return sum;
}

/* Energy, and what changes are made to cost. */
static double cost_of(const Search *s) {
    int32_t excess;
    const int32_t changes = all_changes(s, &excess);
    return energy_of(&s->p) + s->change_price * changes + s->excess_price * excess;
}

static void keep_if_best(Search *s) {
    int32_t excess;
    all_changes(s, &excess);
    const double late = late_by(s), energy = energy_of(&s->p);
    if (excess || late > s->best_late || (late == s->best_late && energy >= s->best_energy)) return;
    s->best_late = late;
    s->best_energy = energy;
    memcpy(s->best, s->p.clock, (size_t)s->p.num_nodes * sizeof *s->best);
}

/* Puts a part on its clock. False, and nothing done, if an instruction was not measured there or all of it runs there. */
static int apply(Search *s, Part part) {
    int differs = 0;
    for (int32_t i = part.begin; i < part.end; i++) {
        const int32_t node = s->order[i];
        if (!s->measured[s->p.type[node] * s->p.num_clocks + part.clock]) return 0;
        differs |= s->p.clock[node] != part.clock;
    }
    if (!differs) return 0;
    /* The node before asks for the clock. */
    const int32_t first = s->order[part.begin], before = s->p.before[first], from = before < first ? before : first;
    if (from < s->from) s->from = from;
    for (int32_t i = part.begin; i < part.end; i++) {
        const int32_t node = s->order[i];
        s->undo[s->num_undo++] = (Undo){node, s->p.clock[node]};
        s->p.clock[node] = part.clock;
    }
    s->num_changes[part.stage] = count_changes(s, part.stage);
    return 1;
}

static void undo(Search *s, const Part *parts, int num_parts) {
    while (s->num_undo) {
        const Undo last = s->undo[--s->num_undo];
        s->p.clock[last.node] = last.clock;
    }
    for (int i = 0; i < num_parts; i++) s->num_changes[parts[i].stage] = count_changes(s, parts[i].stage);
}

/* Makes a move of these parts. Keeps it if the iteration is no later and costs at most so much more. */
static void try_move(Search *s, const Part *parts, int num_parts, double allowance) {
    const double late = late_by(s), cost = cost_of(s);
    int is_move = 0;
    s->num_undo = 0;
    s->from = s->p.num_nodes;
    for (int i = 0; i < num_parts; i++) is_move |= apply(s, parts[i]);
    if (!is_move) return;
    const Rerun rerun = run_steadily(&s->p, s->from, (s->limit + late) * (1 + ROUNDING_ERROR));
    if (rerun.is_given_up || late_by(s) > late || cost_of(s) > cost + allowance) {
        undo(s, parts, num_parts);
        copy(&s->p, &s->kept, rerun.begin, rerun.end);
    } else {
        copy(&s->kept, &s->p, rerun.begin, rerun.end);
        keep_if_best(s);
    }
}

static int32_t within(int32_t value, int32_t least, int32_t most) { return value < least ? least : value > most ? most : value; }

static int32_t clock_at(const Search *s, int32_t place) { return s->p.clock[s->order[place]]; }

static int32_t step_from(Search *s, int32_t clock) {
    const int32_t step = 1 << random_below(s, s->num_steps);
    return within(random_below(s, 2) ? clock + step : clock - step, 0, s->p.num_clocks - 1);
}

/* Small numbers more often than large ones. */
static int32_t some_length(Search *s, int32_t most) {
    int32_t num_doublings = 1;
    while (1 << num_doublings < most) num_doublings++;
    return 1 + random_below(s, 1 << random_below(s, num_doublings));
}

static Part some_part(Search *s) {
    const int32_t stage = random_below(s, s->p.num_stages);
    const int32_t first = s->begin_of_stage[stage], end = s->begin_of_stage[stage + 1];
    const int32_t place = first + random_below(s, end - first), clock = clock_at(s, place);
    int32_t run_begin = place, run_end = place + 1;
    while (run_begin > first && clock_at(s, run_begin - 1) == clock) run_begin--;
    while (run_end < end && clock_at(s, run_end) == clock) run_end++;
    const int32_t length = some_length(s, (end - first) / 2);
    const int32_t before = clock_at(s, run_begin > first ? run_begin - 1 : end - 1);
    const int32_t behind = clock_at(s, run_end < end ? run_end : first);
    switch (random_below(s, 10)) {
    case 0: case 1: case 2: /* another clock for the run */
        return (Part){stage, run_begin, run_end, step_from(s, clock)};
    case 3: /* none of its own */
        return (Part){stage, run_begin, run_end, random_below(s, 2) ? before : behind};
    case 4: /* it begins sooner, */
        return (Part){stage, within(run_begin - length, first, run_begin), run_begin, clock};
    case 5: /* later, */
        return (Part){stage, run_begin, within(run_begin + length, run_begin, run_end), before};
    case 6: /* ends later, */
        return (Part){stage, run_end, within(run_end + length, run_end, end), clock};
    case 7: /* sooner */
        return (Part){stage, within(run_end - length, run_begin, run_end), run_end, behind};
    case 8: /* another clock for some of it */
        return (Part){stage, place, within(place + length, place, run_end), step_from(s, clock)};
    default: /* or a clock that the stage has elsewhere */
        return (Part){stage, place, within(place + length, place, run_end), clock_at(s, first + random_below(s, end - first))};
    }
}

/* Searches from the clocks that the pipeline runs at. `warmth`: by how much a kept move may cost more at first, on average, in
 * energies of an instruction. */
static void anneal(Search *s, int64_t num_moves, double warmth) {
    const double unit = energy_of(&s->p) / s->p.num_nodes;
    s->change_price = PRICE_OF_CHANGE * unit;
    for (int64_t i = 0; i < num_moves; i++) {
        const double progress = (double)i / (double)num_moves;
        const double temperature = warmth * unit * pow(COLD / warmth, progress);
        s->excess_price = PRICE_OF_EXCESS * unit * pow(COLD / PRICE_OF_EXCESS, 1 - progress);
        Part parts[MOST_PARTS];
        const int num_parts = random_below(s, 3) == 0 ? MOST_PARTS : 1;
        for (int k = 0; k < num_parts; k++) parts[k] = some_part(s);
        try_move(s, parts, num_parts, -temperature * log(1 - random_share(s)));
    }
}

static int allocate(Pipeline *p) {
    const size_t n = (size_t)p->num_nodes, stages = (size_t)p->num_stages;
    p->clock = malloc(n * sizeof *p->clock);
    p->end = malloc(n * sizeof *p->end);
    p->duration = malloc(n * sizeof *p->duration);
    p->spent = malloc(n * sizeof *p->spent);
    p->length_to = malloc(n * sizeof *p->length_to);
    p->total_to = malloc(n * sizeof *p->total_to);
    p->gpu_before = malloc(n * sizeof *p->gpu_before);
    p->first = malloc(stages * sizeof *p->first);
    p->last = malloc(stages * sizeof *p->last);
    p->first_of_longest = malloc(stages * sizeof *p->first_of_longest);
    p->is_found = malloc(stages);
    p->least_tail = malloc(n * sizeof *p->least_tail);
    return p->clock && p->end && p->duration && p->spent && p->length_to && p->total_to && p->gpu_before && p->first && p->last &&
           p->first_of_longest && p->is_found && p->least_tail;
}

static void release(Pipeline *p) {
    void *owned[] = {p->clock, p->end, p->duration, p->spent, p->length_to, p->total_to, p->gpu_before, p->first, p->last,
                     p->first_of_longest, p->is_found, p->least_tail};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

static void run_at(Pipeline *p, const int32_t *clock) {
    memcpy(p->clock, clock, (size_t)p->num_nodes * sizeof *clock);
    for (int32_t s = 0; s < p->num_stages; s++) p->first[s] = (Gpu){.clock = clock[p->first_node[s]], .free_at = -INFINITY};
    run_until_steady(p);
}

static void search(Search *s, const int32_t *clock, int64_t num_moves, double warmth) {
    run_at(&s->p, clock);
    copy(&s->kept, &s->p, 0, s->p.num_nodes);
    for (int32_t stage = 0; stage < s->p.num_stages; stage++) s->num_changes[stage] = count_changes(s, stage);
    while (4 << s->num_steps <= s->p.num_clocks) s->num_steps++;
    s->best_late = s->best_energy = INFINITY;
    keep_if_best(s);
    anneal(s, num_moves, warmth);
    if (isfinite(s->best_energy)) run_at(&s->p, s->best);
}

const char run_with_switching_doc[] =
    "run_with_switching(first_predecessor, predecessor, predecessor_latency, stage, type, before, behind, first_node, order,\n"
    "                   begin_of_stage, time, cost, measured, clock, num_clocks, up, down, call, jitter, outside, waiting_power,\n"
    "                   limit, max_changes_per_s, num_moves, warmth, /)\n\n"
    "Runs an iteration in which changes of clock take time: up or down from asking until in force, give or take jitter;\n"
    "another may be asked for when it is in force, and a call has returned. With\n"
    "num_moves, clocks are searched for first, from the given ones on, that take no longer than `limit` without `outside`,\n"
    "with at most so many changes a second on each stage. If none are found, what is returned is late, or changes more often.\n\n"
    "Nodes are numbered in a topological order. time, cost, measured: per type and clock, faster clocks behind slower ones.\n"
    "before, behind: a node's neighbours on its stage, in a ring. order, begin_of_stage: nodes stage by stage.\n"
    "Returns clocks (int32 bytes), durations and costs (float64 bytes).";

PyObject *run_with_switching(PyObject *module, PyObject *args) {
    (void)module;
    enum { FIRST_PREDECESSOR, PREDECESSOR, PREDECESSOR_LATENCY, STAGE, TYPE, BEFORE, BEHIND, FIRST_NODE, ORDER, BEGIN_OF_STAGE,
           TIME, COST, MEASURED, CLOCK, NUM_ARRAYS };
    Py_buffer b[NUM_ARRAYS];
    Latency latency;
    double outside, waiting_power, limit, max_changes_per_s, warmth;
    long long num_moves;
    int num_clocks;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*y*y*y*y*y*y*y*iddddddddLd", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7],
                          &b[8], &b[9], &b[10], &b[11], &b[12], &b[13], &num_clocks, &latency.up, &latency.down, &latency.call, &latency.jitter,
                          &outside, &waiting_power, &limit, &max_changes_per_s, &num_moves, &warmth))
        return NULL;
    const size_t n = (size_t)b[CLOCK].len / sizeof(int32_t), num_stages = (size_t)b[FIRST_NODE].len / sizeof(int32_t);
    const Pipeline given = {
        .num_nodes = (int32_t)n, .num_stages = (int32_t)num_stages, .num_clocks = num_clocks,
        .first_predecessor = b[FIRST_PREDECESSOR].buf, .predecessor = b[PREDECESSOR].buf,
        .predecessor_latency = b[PREDECESSOR_LATENCY].buf, .stage = b[STAGE].buf, .type = b[TYPE].buf, .before = b[BEFORE].buf,
        .behind = b[BEHIND].buf, .first_node = b[FIRST_NODE].buf, .time = b[TIME].buf, .cost = b[COST].buf, .latency = latency,
        .outside = outside, .waiting_power = waiting_power,
    };
    Search s = {
        .p = given, .kept = given, .measured = b[MEASURED].buf, .order = b[ORDER].buf, .begin_of_stage = b[BEGIN_OF_STAGE].buf,
        .limit = limit, .max_changes_per_s = max_changes_per_s, .num_changes = malloc(num_stages * sizeof *s.num_changes),
        .undo = malloc(MOST_PARTS * n * sizeof *s.undo), .num_steps = 1, .best = malloc(n * sizeof *s.best),
        .random_state = SEED,
    };
    PyObject *result = NULL;
    if (allocate(&s.p) & allocate(&s.kept) && s.num_changes && s.undo && s.best) {
        Py_BEGIN_ALLOW_THREADS
        settle_least_tails(&s.p);
        if (num_moves)
            search(&s, b[CLOCK].buf, num_moves, warmth);
        else
            run_at(&s.p, b[CLOCK].buf);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("y#y#y#", s.p.clock, (Py_ssize_t)(n * sizeof(int32_t)), s.p.duration,
                               (Py_ssize_t)(n * sizeof(double)), s.p.spent, (Py_ssize_t)(n * sizeof(double)));
    } else
        PyErr_NoMemory();
    release(&s.p);
    release(&s.kept);
    free(s.num_changes);
    free(s.undo);
    free(s.best);
    for (int i = 0; i < NUM_ARRAYS; i++) PyBuffer_Release(&b[i]);
    return result;
}
