/* Plans on real clocks: repair, slack reclamation, and iterated greedy search around it.
 *
 * A plan puts every node on a point of its curve. The longest path to the beginning of a node is its start, the longest path from
 * its end is its tail; what start, time and tail leave of the limit is the node's slack.
 *
 * Repair steps nodes of critical paths to faster points, least cost per second first, until the longest path is within the limit.
 *
 * Reclamation steps nodes to slower points, best saving per second first, while every path stays within the limit.
 *
 * Iterated greedy (Ruiz and Stuetzle 2007) makes a few connected nodes faster, reclaims again with the savings weighed
 * at random, and keeps what is not worse. It works on one window of the order of execution after the other: nodes before a window
 * keep their starts, nodes behind it their tails, so a trial costs what the window costs, not what the plan costs. */
#include "native.h"

#include <math.h>

typedef struct {
    int32_t num_nodes;
    const int32_t *order; /* nodes in topological order */
    const int32_t *first_predecessor, *predecessor, *first_successor, *successor;
    const double *predecessor_latency, *successor_latency;
    const int32_t *curve, *first_point;
    const double *time, *cost; /* per point of a curve: times ascending, costs descending */
    double limit;
    int32_t *point;        /* per node: where on its curve it is, an index into time and cost */
    double *start, *tail;  /* longest path to the beginning of a node, and from its end */
    int32_t *place;        /* per node: its place in the order */
    int32_t begin, end;    /* the window: places that may change */
    double *weight;        /* per node: what its savings are weighed with */
    /* A max-heap of nodes by the weighed saving per second of their next step. Savings only shrink while a node waits. */
    int32_t *heap, heap_size;
    double *rate;
    int32_t *queue; /* circular, nodes whose neighbours may have to move */
    uint8_t *queued;
    int32_t *best;  /* per node: its point in the best plan */
    uint64_t random_state;
} Plan;

/* Sums of the same times in another order differ by less than this share. */
static const double ROUNDING_ERROR = 1e-12;

/* The step of one node that saves most per second within its slack, or NONE. */
static int32_t best_step(const Plan *p, int32_t node, double *rate) {
    const int32_t at = p->point[node], end = p->first_point[p->curve[node] + 1];
    const double longest = p->limit * (1 - ROUNDING_ERROR) - p->start[node] - p->tail[node];
    int32_t best = NONE;
    *rate = 0;
    for (int32_t to = at + 1; to < end && p->time[to] <= longest; to++) {
        const double saved = p->weight[node] * (p->cost[at] - p->cost[to]) / (p->time[to] - p->time[at]);
        if (saved > *rate) {
            *rate = saved;
            best = to;
        }
    }
    return best;
}

static void sift_up(Plan *p, int32_t at) {
    const int32_t node = p->heap[at];
    for (; at > 0 && p->rate[p->heap[(at - 1) / 2]] < p->rate[node]; at = (at - 1) / 2) p->heap[at] = p->heap[(at - 1) / 2];
    p->heap[at] = node;
}

static void sift_down(Plan *p) {
    const int32_t node = p->heap[0];
    int32_t at = 0;
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= p->heap_size) break;
        if (child + 1 < p->heap_size && p->rate[p->heap[child + 1]] > p->rate[p->heap[child]]) child++;
        if (p->rate[p->heap[child]] <= p->rate[node]) break;
        p->heap[at] = p->heap[child];
        at = child;
    }
    p->heap[at] = node;
}

/* Longest path up to `node` along the edges given. */
static double longest_path(const Plan *p, int32_t node, const int32_t *first, const int32_t *neighbour, const double *latency,
                           const double *path) {
    double longest = 0;
    for (int32_t e = first[node]; e < first[node + 1]; e++) {
        const double reach = path[neighbour[e]] + p->time[p->point[neighbour[e]]] + latency[e];
        if (reach > longest) longest = reach;
    }
    return longest;
}

static void settle_starts(Plan *p, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; i++)
        p->start[p->order[i]] =
            longest_path(p, p->order[i], p->first_predecessor, p->predecessor, p->predecessor_latency, p->start);
}

static void settle_tails(Plan *p, int32_t begin, int32_t end) {
    for (int32_t i = end; i-- > begin;)
        p->tail[p->order[i]] = longest_path(p, p->order[i], p->first_successor, p->successor, p->successor_latency, p->tail);
}

/* Lets the longer duration of `node` reach the starts of those after it, or the tails of those before it, in the window. */
static void spread(Plan *p, int32_t node, const int32_t *first, const int32_t *neighbour, const double *latency, double *path) {
    const int32_t n = p->num_nodes;
    int32_t begin = 0, waiting = 1;
    p->queue[0] = node;
    while (waiting) {
        const int32_t from = p->queue[begin];
        begin = begin + 1 == n ? 0 : begin + 1;
        waiting--;
        p->queued[from] = 0;
        const double reach = path[from] + p->time[p->point[from]];
        for (int32_t e = first[from]; e < first[from + 1]; e++) {
            const int32_t to = neighbour[e];
            if (reach + latency[e] <= path[to] || p->place[to] < p->begin || p->place[to] >= p->end) continue;
            path[to] = reach + latency[e];
            if (p->queued[to]) continue;
            p->queued[to] = 1;
            const int32_t last = begin + waiting++;
            p->queue[last < n ? last : last - n] = to;
        }
    }
}

/* Spends the slack of the window; starts and tails must be settled. Returns the cost saved. */
static double reclaim(Plan *p) {
    double saved = 0;
    p->heap_size = 0;
    for (int32_t i = p->begin; i < p->end; i++) {
        const int32_t node = p->order[i];
        if (best_step(p, node, &p->rate[node]) == NONE) continue;
        p->heap[p->heap_size] = node;
        sift_up(p, p->heap_size++);
    }
    while (p->heap_size) {
        const int32_t node = p->heap[0];
        double rate;
        const int32_t to = best_step(p, node, &rate);
        if (to != NONE && rate >= p->rate[node]) {
            saved += p->cost[p->point[node]] - p->cost[to];
            p->point[node] = to;
            spread(p, node, p->first_successor, p->successor, p->successor_latency, p->start);
            spread(p, node, p->first_predecessor, p->predecessor, p->predecessor_latency, p->tail);
            best_step(p, node, &rate);
        }
        p->rate[node] = rate;
        if (rate == 0) p->heap[0] = p->heap[--p->heap_size];
        if (p->heap_size) sift_down(p);
    }
    return saved;
}

/* xorshift64 (Marsaglia 2003): uniform in [0, 1). */
static double uniform(Plan *p) {
    uint64_t x = p->random_state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    p->random_state = x;
    return (double)(x >> 11) / 9007199254740992.0;
}

static int32_t below(Plan *p, int32_t bound) { return (int32_t)(uniform(p) * bound); }

/* A random neighbour of a node in the DAG, or the node itself if that lies outside the window. */
static int32_t neighbour_in_window(Plan *p, int32_t node) {
    const int32_t before = p->first_predecessor[node + 1] - p->first_predecessor[node];
    const int32_t after = p->first_successor[node + 1] - p->first_successor[node];
    if (before + after == 0) return node;
    const int32_t k = below(p, before + after);
    const int32_t other =
        k < before ? p->predecessor[p->first_predecessor[node] + k] : p->successor[p->first_successor[node] + k - before];
    return p->place[other] >= p->begin && p->place[other] < p->end ? other : node;
}

enum { MOST_HASTENED = 12, MOST_STEPS = 3 };
static const double UNEVENNESS = 0.3; /* savings are weighed between 1 - this and 1 + this */

/* Makes a few connected nodes of the window faster. Returns the cost added. */
static double hasten(Plan *p) {
    int32_t chosen[MOST_HASTENED];
    const int32_t num_chosen = 1 + below(p, MOST_HASTENED);
    double added = 0;
    for (int32_t k = 0; k < num_chosen; k++) {
        const int32_t node = k ? neighbour_in_window(p, chosen[below(p, k)]) : p->order[p->begin + below(p, p->end - p->begin)];
        const int32_t fastest = p->first_point[p->curve[node]];
        const int32_t to = p->point[node] - 1 - below(p, MOST_STEPS);
        chosen[k] = node;
        added -= p->cost[p->point[node]];
        p->point[node] = to < fastest ? fastest : to;
        added += p->cost[p->point[node]];
    }
    return added;
}

static void search_window(Plan *p, int32_t num_trials) {
    for (int32_t i = p->begin; i < p->end; i++) p->best[p->order[i]] = p->point[p->order[i]];
    for (int32_t trial = 0; trial < num_trials; trial++) {
        double added = hasten(p);
        for (int32_t i = p->begin; i < p->end; i++) p->weight[p->order[i]] = 1 + UNEVENNESS * (2 * uniform(p) - 1);
        settle_starts(p, p->begin, p->end);
        settle_tails(p, p->begin, p->end);
        added -= reclaim(p);
        int32_t *from = added <= 0 ? p->point : p->best, *to = added <= 0 ? p->best : p->point;
        for (int32_t i = p->begin; i < p->end; i++) to[p->order[i]] = from[p->order[i]];
    }
    settle_starts(p, p->begin, p->end);
}

/* Windows overlap by half, so that every pair of neighbours is together in one. */
static void search(Plan *p, int32_t window, int32_t trials_per_window) {
    settle_tails(p, 0, p->num_nodes);
    for (p->begin = 0;; p->begin += window / 2) {
        p->end = p->begin + window < p->num_nodes ? p->begin + window : p->num_nodes;
        search_window(p, trials_per_window);
        if (p->end == p->num_nodes) break;
    }
}

static void settle_all(Plan *p) {
    settle_starts(p, 0, p->num_nodes);
    settle_tails(p, 0, p->num_nodes);
}

static void repair(Plan *p) {
    for (settle_all(p);; settle_all(p)) {
        double longest = 0, least = INFINITY;
        for (int32_t node = 0; node < p->num_nodes; node++) {
            const double end = p->start[node] + p->time[p->point[node]];
            if (end > longest) longest = end;
        }
        if (longest <= p->limit) return;
        int32_t cheapest = NONE;
        for (int32_t node = 0; node < p->num_nodes; node++) {
            const int32_t at = p->point[node];
            const double path = p->start[node] + p->time[at] + p->tail[node];
            if (at == p->first_point[p->curve[node]] || path < longest * (1 - ROUNDING_ERROR)) continue;
            const double rate = (p->cost[at - 1] - p->cost[at]) / (p->time[at] - p->time[at - 1]);
            if (rate >= least) continue;
            least = rate;
            cheapest = node;
        }
        if (cheapest == NONE) return; /* as fast as can be */
        p->point[cheapest]--;
    }
}

static void reclaim_all(Plan *p) {
    for (int32_t node = 0; node < p->num_nodes; node++) p->weight[node] = 1;
    p->begin = 0;
    p->end = p->num_nodes;
    settle_all(p);
    reclaim(p);
}

const char improve_plan_doc[] =
    "improve_plan(order, first_predecessor, predecessor, predecessor_latency, first_successor, successor,\n"
    "             successor_latency, curve, first_point, time, cost, point, limit, window, trials_per_window, /)\n\n"
    "Brings a plan within `limit` if that can be, reclaims its slack, then searches around it if there are trials.\n\n"
    "order: nodes in topological order. Edges are given twice, by successor and by predecessor. point: index of each node\n"
    "into time and cost.\n"
    "Returns the new points (int32 bytes), which leave no single step that would save in time.";

PyObject *improve_plan(PyObject *module, PyObject *args) {
    (void)module;
    enum { ORDER, FIRST_PREDECESSOR, PREDECESSOR, PREDECESSOR_LATENCY, FIRST_SUCCESSOR, SUCCESSOR, SUCCESSOR_LATENCY, CURVE,
           FIRST_POINT, TIME, COST, POINT, NUM_ARRAYS };
    Py_buffer b[NUM_ARRAYS];
    double limit;
    int window, trials_per_window;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*y*y*y*y*y*dii", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7], &b[8],
                          &b[9], &b[10], &b[11], &limit, &window, &trials_per_window))
        return NULL;
    const size_t n = (size_t)b[POINT].len / sizeof(int32_t);
    Plan p = {
        .num_nodes = (int32_t)n, .order = b[ORDER].buf,
        .first_predecessor = b[FIRST_PREDECESSOR].buf, .predecessor = b[PREDECESSOR].buf,
        .predecessor_latency = b[PREDECESSOR_LATENCY].buf,
        .first_successor = b[FIRST_SUCCESSOR].buf, .successor = b[SUCCESSOR].buf,
        .successor_latency = b[SUCCESSOR_LATENCY].buf,
        .curve = b[CURVE].buf, .first_point = b[FIRST_POINT].buf, .time = b[TIME].buf, .cost = b[COST].buf, .limit = limit,
        .point = malloc(n * sizeof(int32_t)), .start = malloc(n * sizeof(double)), .tail = malloc(n * sizeof(double)),
        .place = malloc(n * sizeof(int32_t)), .weight = malloc(n * sizeof(double)),
        .heap = malloc(n * sizeof(int32_t)), .rate = malloc(n * sizeof(double)),
        .queue = malloc(n * sizeof(int32_t)), .queued = calloc(n, 1), .best = malloc(n * sizeof(int32_t)),
        .random_state = 88172645463325252ULL,
    };
    PyObject *result = NULL;
    if (p.point && p.start && p.tail && p.place && p.weight && p.heap && p.rate && p.queue && p.queued && p.best) {
        memcpy(p.point, b[POINT].buf, n * sizeof(int32_t));
        for (int32_t i = 0; i < p.num_nodes; i++) p.place[p.order[i]] = i;
        Py_BEGIN_ALLOW_THREADS
        repair(&p);
        reclaim_all(&p);
        if (trials_per_window) {
            search(&p, window, trials_per_window);
            reclaim_all(&p);
        }
        Py_END_ALLOW_THREADS
        result = PyBytes_FromStringAndSize((char *)p.point, (Py_ssize_t)(n * sizeof(int32_t)));
    } else
        PyErr_NoMemory();
    void *owned[] = {p.point, p.start, p.tail, p.place, p.weight, p.heap, p.rate, p.queue, p.queued, p.best};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    for (int i = 0; i < NUM_ARRAYS; i++) PyBuffer_Release(&b[i]);
    return result;
}
