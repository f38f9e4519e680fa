/* Slack reclamation: makes instructions of a plan slower where that saves energy and the iteration takes no longer. */
#include "native.h"

typedef struct {
    int32_t num_nodes;
    const int32_t *first_predecessor, *predecessor, *first_successor, *successor;
    const double *predecessor_latency, *successor_latency;
    const int32_t *curve, *first_point;
    const double *time, *cost; /* per point of a curve: times ascending, costs descending */
    int32_t *point;            /* per node: where on its curve it is, an index into time and cost */
    double *start, *tail;      /* longest path to the beginning of a node, and from its end */
    double limit;
    /* A max-heap of nodes by the saving per second of their next step. Savings only shrink while a node waits. */
    int32_t *heap, heap_size;
    double *rate;
    int32_t *queue; /* circular, nodes whose neighbours may have to move */
    uint8_t *queued;
} Plan;

/* The step of one node that saves most per second within its slack, or NONE. */
static int32_t best_step(const Plan *p, int32_t node, double *rate) {
    const int32_t at = p->point[node], end = p->first_point[p->curve[node] + 1];
    const double longest = p->limit - p->start[node] - p->tail[node];
    int32_t best = NONE;
    *rate = 0;
    for (int32_t to = at + 1; to < end && p->time[to] <= longest; to++) {
        const double saved = (p->cost[at] - p->cost[to]) / (p->time[to] - p->time[at]);
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

/* Lets the longer duration of `node` reach the starts of those after it, or the tails of those before it. */
static void spread(Plan *p, int32_t node, const int32_t *first, const int32_t *neighbour, const double *latency, double *path) {
    const int32_t n = p->num_nodes;
    int32_t begin = 0, waiting = 1;
    p->queue[0] = node;
    while (waiting) {
        const int32_t from = p->queue[begin];
        begin = (begin + 1) % n;
        waiting--;
        p->queued[from] = 0;
        const double reach = path[from] + p->time[p->point[from]];
        for (int32_t e = first[from]; e < first[from + 1]; e++) {
            const int32_t to = neighbour[e];
            if (reach + latency[e] <= path[to]) continue;
            path[to] = reach + latency[e];
            if (p->queued[to]) continue;
            p->queued[to] = 1;
            p->queue[(begin + waiting++) % n] = to;
        }
    }
}

static void reclaim(Plan *p) {
    for (int32_t node = 0; node < p->num_nodes; node++) {
        if (best_step(p, node, &p->rate[node]) == NONE) continue;
        p->heap[p->heap_size] = node;
        sift_up(p, p->heap_size++);
    }
    while (p->heap_size) {
        const int32_t node = p->heap[0];
        double rate;
        const int32_t to = best_step(p, node, &rate);
        if (to != NONE && rate >= p->rate[node]) {
            p->point[node] = to;
            spread(p, node, p->first_successor, p->successor, p->successor_latency, p->start);
            spread(p, node, p->first_predecessor, p->predecessor, p->predecessor_latency, p->tail);
            best_step(p, node, &rate);
        }
        p->rate[node] = rate;
        if (rate == 0) p->heap[0] = p->heap[--p->heap_size];
        if (p->heap_size) sift_down(p);
    }
}

const char reclaim_slack_doc[] =
    "reclaim_slack(first_predecessor, predecessor, predecessor_latency, first_successor, successor, successor_latency, curve,\n"
    "              first_point, time, cost, point, start, tail, limit, /)\n\n"
    "Steps nodes to slower points of their curves, best saving per second first, while the longest path stays within `limit`.\n\n"
    "Edges are given twice, by successor and by predecessor. point: index of each node into time and cost. start, tail: longest\n"
    "paths before and behind each node. Returns the new points (int32 bytes).";

PyObject *reclaim_slack(PyObject *module, PyObject *args) {
    (void)module;
    enum { FIRST_PREDECESSOR, PREDECESSOR, PREDECESSOR_LATENCY, FIRST_SUCCESSOR, SUCCESSOR, SUCCESSOR_LATENCY, CURVE,
           FIRST_POINT, TIME, COST, POINT, START, TAIL, NUM_ARRAYS };
    Py_buffer b[NUM_ARRAYS];
    double limit;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*y*y*y*y*y*y*d", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7], &b[8],
                          &b[9], &b[10], &b[11], &b[12], &limit))
        return NULL;
    const size_t n = (size_t)b[POINT].len / sizeof(int32_t);
    Plan p = {
        .num_nodes = (int32_t)n,
        .first_predecessor = b[FIRST_PREDECESSOR].buf, .predecessor = b[PREDECESSOR].buf,
        .predecessor_latency = b[PREDECESSOR_LATENCY].buf,
        .first_successor = b[FIRST_SUCCESSOR].buf, .successor = b[SUCCESSOR].buf,
        .successor_latency = b[SUCCESSOR_LATENCY].buf,
        .curve = b[CURVE].buf, .first_point = b[FIRST_POINT].buf, .time = b[TIME].buf, .cost = b[COST].buf,
        .point = malloc(n * sizeof(int32_t)), .start = malloc(n * sizeof(double)), .tail = malloc(n * sizeof(double)),
        .limit = limit, .heap = malloc(n * sizeof(int32_t)), .rate = malloc(n * sizeof(double)),
        .queue = malloc(n * sizeof(int32_t)), .queued = calloc(n, 1),
    };
    PyObject *result = NULL;
    if (p.point && p.start && p.tail && p.heap && p.rate && p.queue && p.queued) {
        memcpy(p.point, b[POINT].buf, n * sizeof(int32_t));
        memcpy(p.start, b[START].buf, n * sizeof(double));
        memcpy(p.tail, b[TAIL].buf, n * sizeof(double));
        Py_BEGIN_ALLOW_THREADS
        reclaim(&p);
        Py_END_ALLOW_THREADS
        result = PyBytes_FromStringAndSize((char *)p.point, (Py_ssize_t)(n * sizeof(int32_t)));
    } else
        PyErr_NoMemory();
    void *owned[] = {p.point, p.start, p.tail, p.heap, p.rate, p.queue, p.queued};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    for (int i = 0; i < NUM_ARRAYS; i++) PyBuffer_Release(&b[i]);
    return result;
}
