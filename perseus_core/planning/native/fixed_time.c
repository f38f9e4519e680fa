/* The cheapest lengths for one given T, of networks too large to trace: cost scaling for convex-cost flow (Goldberg and Tarjan
 * 1990; convex curves as in Ahuja, Hochbaum and Orlin 2003).
 *
 * An arc of length -T from sink to source makes every flow a circulation. Moments and flow are optimal together when no way
 * has slack below 0 (network.h) and the flow is balanced at every node. A phase asks only for slack of at least -epsilon. It
 * starts with moments that keep T, lets flow rise and fall in arcs until their slack agrees, and then pushes what is too
 * much at one node to where it is missing, along ways of negative slack. A node with too much and no such way moves later.
 * Then come the next phase and a smaller epsilon.
 *
 * Each phase ends with lengths that keep T and with a balanced flow, so a plan and a proved bound: for a balanced flow,
 * sum(cost(length) + flow * length) is the cost, and its least over all lengths, arc by arc, is below any cost. The run
 * stops when the two are near enough.
 */
#include "network.h"

#define EPSILON_FACTOR 8

/* Side by side, because whoever looks at one of these looks at the others: most of the time goes into waiting for memory. */
typedef struct {
    int64_t moment, excess; /* excess: flow in - flow out */
    int32_t distance;       /* to the nearest deficit, in epsilons */
    int32_t next_incidence; /* ways before this one have no negative slack */
    int32_t queued;
} Node;

/* A node in the list of those at one distance. */
typedef struct {
    int32_t node, next;
} Entry;

typedef struct {
    Network net; /* arcs sorted by the topological place of their tail; last the arc from sink to source */
    int32_t source;
    Node *nodes;
    int64_t *latest; /* per node: with which T is kept when all that follows is fastest */
    int64_t epsilon;

    int32_t *queue; /* a ring: nodes with positive excess */
    int32_t queue_begin, queue_size;

    int32_t *nearest; /* per distance below num_nodes: the first entry of its list */
    Entry *entries;
    int32_t num_entries;
} Scaler;

static int64_t slack_of(const Scaler *s, int32_t way, int32_t from, int32_t to) {
    return slack(&s->net, way, s->nodes[to].moment - s->nodes[from].moment);
}

/* ---- moments that keep T ---- */

static void find_latest(Scaler *s) {
    const Arc *back = &s->net.arcs[s->net.num_arcs - 1];
    for (int32_t v = 0; v < s->net.num_nodes; v++) s->latest[v] = -s->net.length[back->fastest];
    for (const Arc *arc = back - 1; arc >= s->net.arcs; arc--) {
        const int64_t latest = s->latest[arc->head] - s->net.length[arc->fastest];
        if (latest < s->latest[arc->tail]) s->latest[arc->tail] = latest;
    }
}

/* Moves moments as little as makes every arc at least as long as its fastest knot and the whole no longer than T. */
static void make_feasible(Scaler *s) {
    const int64_t origin = s->nodes[s->source].moment;
    for (int32_t v = 0; v < s->net.num_nodes; v++) {
        s->nodes[v].moment -= origin;
        if (s->nodes[v].moment < 0) s->nodes[v].moment = 0;
        if (s->nodes[v].moment > s->latest[v]) s->nodes[v].moment = s->latest[v];
    }
    for (const Arc *arc = s->net.arcs; arc < s->net.arcs + s->net.num_arcs - 1; arc++) {
        const int64_t earliest = s->nodes[arc->tail].moment + s->net.length[arc->fastest];
        if (earliest > s->nodes[arc->head].moment) s->nodes[arc->head].moment = earliest;
    }
}

/* What shortening an arc from its slowest to `length` costs. */
static double cost(const Network *net, const Arc *arc, int64_t length) {
    double sum = 0;
    for (int32_t knot = arc->slowest; knot > arc->fastest && length < net->length[knot]; knot--) {
        const int64_t faster = length > net->length[knot - 1] ? length : net->length[knot - 1];
        sum += (double)net->steepness[knot - 1] * (double)(net->length[knot] - faster);
    }
    return sum;
}

/* By how much the cost of the moments lies above the bound that the flow proves; summed arc by arc, where it is never negative. */
static double gap(const Scaler *s) {
    double sum = 0;
    for (const Arc *arc = s->net.arcs; arc < s->net.arcs + s->net.num_arcs; arc++) {
        const int64_t between = s->nodes[arc->head].moment - s->nodes[arc->tail].moment, best = s->net.length[arc->knot];
        sum += cost(&s->net, arc, between) - cost(&s->net, arc, best) + (double)arc->flow * (double)(between - best);
    }
    return sum;
}

/* ---- one phase ---- */

static void enqueue(Scaler *s, int32_t node) {
    if (s->nodes[node].queued) return;
    const int32_t end = s->queue_begin + s->queue_size++;
    s->queue[end < s->net.num_nodes ? end : end - s->net.num_nodes] = node;
    s->nodes[node].queued = 1;
}

static void move_flow(Scaler *s, int32_t way, int32_t from, int32_t to, int64_t amount) {
    push(&s->net, way, amount);
    s->nodes[from].excess -= amount;
    s->nodes[to].excess += amount;
    if (s->nodes[to].excess > 0) enqueue(s, to);
}

/* Lets the flow of every arc rise or fall until no way has slack below -epsilon. */
static void relax(Scaler *s) {
    for (int32_t a = 0; a < s->net.num_arcs; a++) {
        for (int32_t way = 2 * a; way <= 2 * a + 1; way++) {
            const int32_t from = way_from(&s->net, way), to = way_from(&s->net, way ^ 1);
            while (walkable(&s->net, way) && slack_of(s, way, from, to) < -s->epsilon)
                move_flow(s, way, from, to, capacity(&s->net, way));
        }
    }
}

/* Enters a node in the list of its distance, unless it is known to be as near. The last list takes all that are farther, and
 * what overflowed. */
static void offer(Scaler *s, int32_t node, int64_t distance) {
    if (distance < 0 || distance >= s->net.num_nodes) distance = s->net.num_nodes - 1;
    if (distance >= s->nodes[node].distance) return;
    s->nodes[node].distance = (int32_t)distance;
    s->entries[s->num_entries] = (Entry){node, s->nearest[distance]};
    s->nearest[distance] = s->num_entries++;
}

/* Moves every node later by its distance to the nearest deficit, at most that of the farthest excess: then each excess has a
 * path of negative slack to a deficit (the global update of Goldberg 1997). Distances are counted in epsilons, rounded down: so
 * lists serve instead of a heap. An excess can always go back to the deficit that it came from; false only after an overflow. */
static int move_towards_deficits(Scaler *s) {
    int32_t num_to_find = 0, farthest = 0;
    s->num_entries = 0;
    for (int32_t d = 0; d < s->net.num_nodes; d++) s->nearest[d] = NONE;
    for (int32_t v = 0; v < s->net.num_nodes; v++) {
        s->nodes[v].distance = INT32_MAX;
        num_to_find += s->nodes[v].excess > 0;
        if (s->nodes[v].excess < 0) offer(s, v, 0);
    }
    while (num_to_find > 0) {
        const int32_t entry = s->nearest[farthest];
        if (entry == NONE) {
            if (++farthest == s->net.num_nodes) return 0;
            continue;
        }
        const int32_t node = s->entries[entry].node;
        s->nearest[farthest] = s->entries[entry].next;
        if (s->nodes[node].distance < farthest) continue; /* it was found to be nearer since */
        num_to_find -= s->nodes[node].excess > 0;
        for (int32_t i = s->net.first_incidence[node]; i < s->net.first_incidence[node + 1]; i++) {
            const int32_t from = s->net.incidences[i].neighbour, way = s->net.incidences[i].way ^ 1;
            if (s->nodes[from].distance > farthest && walkable(&s->net, way))
                offer(s, from, farthest + (slack_of(s, way, from, node) + s->epsilon) / s->epsilon);
        }
    }
    for (int32_t v = 0; v < s->net.num_nodes; v++) {
        Node *node = &s->nodes[v];
        node->moment += s->epsilon * (node->distance < farthest ? node->distance : farthest);
        node->next_incidence = s->net.first_incidence[v];
    }
    return 1;
}

/* Moves a node later until one way from it has slack -epsilon. */
static void move_later(Scaler *s, int32_t node) {
    int64_t least = UNBOUNDED;
    for (int32_t i = s->net.first_incidence[node]; i < s->net.first_incidence[node + 1]; i++) {
        const Incidence at = s->net.incidences[i];
        if (!walkable(&s->net, at.way)) continue;
        const int64_t room = slack_of(s, at.way, node, at.neighbour);
        if (room < least) least = room;
    }
    s->nodes[node].moment += least + s->epsilon;
    s->nodes[node].next_incidence = s->net.first_incidence[node];
}

/* Pushes a node's excess along ways of negative slack; true when some is left and the node had to move. */
static int discharge(Scaler *s, int32_t node) {
    while (s->nodes[node].excess > 0) {
        if (s->nodes[node].next_incidence == s->net.first_incidence[node + 1]) {
            move_later(s, node);
            return 1;
        }
        const Incidence at = s->net.incidences[s->nodes[node].next_incidence];
        if (!walkable(&s->net, at.way) || slack_of(s, at.way, node, at.neighbour) >= 0) {
            s->nodes[node].next_incidence++;
            continue;
        }
        const int64_t most = capacity(&s->net, at.way);
        move_flow(s, at.way, node, at.neighbour, most < s->nodes[node].excess ? most : s->nodes[node].excess);
    }
    return 0;
}

static int balance(Scaler *s) {
    if (!move_towards_deficits(s)) return 0;
    int32_t num_moved = 0;
    while (s->queue_size > 0) {
        const int32_t node = s->queue[s->queue_begin];
        if (++s->queue_begin == s->net.num_nodes) s->queue_begin = 0;
        s->queue_size--;
        s->nodes[node].queued = 0;
        if (!discharge(s, node)) continue;
        enqueue(s, node);
        if (++num_moved == 1 + s->net.num_nodes / 4) {
            if (!move_towards_deficits(s)) return 0;
            num_moved = 0;
        }
    }
    return 1;
}

/* Takes over a flow that need not be balanced. */
static void set_flow(Scaler *s, const int64_t *flow) {
    for (int32_t a = 0; a < s->net.num_arcs; a++) {
        Arc *arc = &s->net.arcs[a];
        arc->flow = flow[a];
        while (arc->knot > arc->fastest && arc->flow >= s->net.steepness[arc->knot - 1]) arc->knot--;
        s->nodes[arc->tail].excess -= flow[a];
        s->nodes[arc->head].excess += flow[a];
    }
    for (int32_t v = 0; v < s->net.num_nodes; v++)
        if (s->nodes[v].excess > 0) enqueue(s, v);
}

enum { FINISHED, INTERRUPTED, OVERFLOWED };

static int scale(Scaler *s, double tolerance, PyObject *progress, PyThreadState **thread) {
    find_latest(s);
    make_feasible(s);
    for (;;) {
        relax(s);
        if (!balance(s)) return OVERFLOWED;
        make_feasible(s);
        if (s->epsilon == 1 || gap(s) <= tolerance) return FINISHED;
        if (!report(progress, s->epsilon, thread)) return INTERRUPTED;
        s->epsilon = s->epsilon > EPSILON_FACTOR ? s->epsilon / EPSILON_FACTOR : 1;
    }
}

/* The moments, as int64 bytes. */
static PyObject *moments(const Scaler *s) {
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)((size_t)s->net.num_nodes * sizeof(int64_t)));
    if (bytes) {
        int64_t *moment = (int64_t *)PyBytes_AS_STRING(bytes);
        for (int32_t v = 0; v < s->net.num_nodes; v++) moment[v] = s->nodes[v].moment;
    }
    return bytes;
}

const char solve_at_time_doc[] =
    "solve_at_time(tail, head, curve, first_knot, length, steepness, moment, flow, source, epsilon, tolerance,\n"
    "              progress, /)\n\n"
    "Solves for the T that the last arc, from sink to source with length -T, asks for.\n\n"
    "Arcs but the last are sorted by the topological place of their tail. moment, flow: where to begin; epsilon: how far\n"
    "these may be from optimal at first. Stops when the cost is proved to be within `tolerance` of the least. progress:\n"
    "None or a callable that takes epsilon.\n\n"
    "Returns moments (int64 bytes), flow per arc (int64 bytes) and the proved gap.";

PyObject *solve_at_time(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer tail, head, curve, first_knot, length, steepness, moment, flow;
    int source;
    long long epsilon;
    double tolerance;
    PyObject *progress, *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*y*iLdO", &tail, &head, &curve, &first_knot, &length, &steepness, &moment, &flow,
                          &source, &epsilon, &tolerance, &progress))
        return NULL;
    const size_t n = (size_t)moment.len / sizeof(int64_t), m = (size_t)tail.len / sizeof(int32_t);
    Scaler s = {
        .source = source, .epsilon = epsilon, .nodes = calloc(n, sizeof(Node)), .latest = malloc(n * sizeof(int64_t)),
        .queue = malloc(n * sizeof(int32_t)), .nearest = malloc(n * sizeof(int32_t)),
        .entries = malloc((n + 2 * m) * sizeof(Entry)), /* a node is offered once over each way, or has a deficit */
    };
    const int has_room = network_init(&s.net, (int32_t)n, (int32_t)m, tail.buf, head.buf, curve.buf, first_knot.buf, length.buf,
                                      steepness.buf);
    if (has_room && s.nodes && s.latest && s.queue && s.nearest && s.entries) {
        for (size_t v = 0; v < n; v++) s.nodes[v].moment = ((const int64_t *)moment.buf)[v];
        set_flow(&s, flow.buf);
        PyThreadState *thread = PyEval_SaveThread();
        const int outcome = scale(&s, tolerance, progress, &thread);
        PyEval_RestoreThread(thread);
        if (outcome == FINISHED)
            result = Py_BuildValue("NNd", moments(&s), network_flow(&s.net), gap(&s));
        else if (outcome == OVERFLOWED)
            PyErr_SetString(PyExc_OverflowError, "the flow cannot be balanced: lengths or flow overflow; scale them down");
    } else
        PyErr_NoMemory();
    network_free(&s.net);
    void *owned[] = {s.nodes, s.latest, s.queue, s.nearest, s.entries};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    Py_buffer *views[] = {&tail, &head, &curve, &first_knot, &length, &steepness, &moment, &flow};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) PyBuffer_Release(views[i]);
    return result;
}
