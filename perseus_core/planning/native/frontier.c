/* The exact time - cost frontier of a project network: the primal-dual method of Fulkerson (1961) and Kelley (1961).
 *
 * The network has nodes (moments) and arcs (u, v), each with a convex, decreasing, piecewise-linear curve of cost over
 * length, given by knots (lengths, ascending) and steepness (cost saved per unit of length between neighbouring knots,
 * descending, beyond the last knot 0). A plain dependency is an arc of one knot. Wanted, for every T between the longest
 * path of all-slowest and of all-fastest lengths: the cheapest moments pi with pi[sink] - pi[source] = T.
 *
 * The linear-programming dual is a flow from source to sink. Its value is the slope of the frontier, -dCost/dT. Moments and
 * flow are optimal together when for every arc
 *
 *     at knot k                  steepness right of k <= flow <= steepness left of k (unbounded left of the fastest)
 *     strictly between knots     flow = steepness there
 *     longer than the slowest    flow = 0
 *
 * In terms of a residual network: an arc whose flow may rise can be walked forward, and the length it will then have
 * must not exceed the time between its ends; an arc whose flow may fall can be walked backward, and the length it will
 * then have must not be below it. The difference is the slack, never negative; a walk over arcs of slack 0 from source
 * to sink carries more flow. When there is none, the nodes reached form one side of a cut, and the other side moves
 * earlier until an arc across the cut loses its slack. That shortens T at the constant slope of the flow. A walk whose
 * flow nothing bounds ends it all: some path is at its fastest throughout.
 *
 * This is a successive-shortest-path algorithm in which the search tree survives from step to step: after an augmentation
 * only what hung below the first saturated arc is searched again. Moments on the far side are stored with a shift that is
 * common to them all, so moving them costs nothing.
 *
 * All numbers are integers: slack 0 is exact, flow conservation is exact, termination needs no tolerance. The caller scales
 * seconds and watts to integers far finer than any measurement. The solver runs without Python's global lock.
 */
#include "native.h"

#define UNBOUNDED INT64_MAX

typedef struct {
    /* The network. Arc a runs from tail[a] to head[a]; its knots are first_knot[curve[a]] .. first_knot[curve[a] + 1] - 1. */
    int32_t num_nodes, num_arcs, source, sink;
    const int32_t *tail, *head, *curve, *first_knot;
    const int64_t *length;    /* per knot, ascending within a curve */
    const int64_t *steepness; /* per knot: flow at which an arc leaves it for the next slower one; 0 at the slowest */
    int32_t *first_incident;  /* per node, into incident: arcs leaving and entering it */
    int32_t *incident;        /* arc * 2, plus 1 where the arc enters the node */

    /* The flow. knot[a] is where a's flow may rise: steepness[knot] <= flow < steepness[knot - 1]. */
    int64_t *flow;
    int32_t *knot;
    int64_t value; /* of the whole flow */

    /* The search tree of nodes reached from the source. parent_arc is coded as in incident, seen from the parent. */
    uint8_t *reached;
    int32_t *parent_arc, *first_child, *next_sibling, *previous_sibling;
    int64_t *moment; /* of a node not reached: moment + shift */
    int64_t shift;
    int32_t *queue;
    int32_t queue_begin, queue_end;

    /* A binary heap of nodes not reached, by a lower bound of the shift at which they will be. */
    int32_t *heap, *place, *via;
    int64_t *due;
    int32_t heap_size;
} Solver;

/* ---- arcs ---- */

typedef struct {
    int32_t from, to;
    int64_t slack, capacity;
} Residual;

/* The residual arc that walks `coded` from one of its ends to the other; capacity 0 where it cannot be walked. */
static Residual residual(const Solver *s, int32_t coded) {
    const int32_t a = coded >> 1, knot = s->knot[a], u = s->tail[a], v = s->head[a];
    const int32_t first = s->first_knot[s->curve[a]], last = s->first_knot[s->curve[a] + 1] - 1;
    int64_t between = s->moment[v] - s->moment[u];
    between += s->reached[v] ? 0 : -s->shift;
    between -= s->reached[u] ? 0 : -s->shift;
    if (!(coded & 1)) {
        const int64_t limit = knot == first ? UNBOUNDED : s->steepness[knot - 1] - s->flow[a];
        return (Residual){u, v, between - s->length[knot], limit};
    }
    const int32_t slower = s->flow[a] > s->steepness[knot] ? knot : knot + 1;
    if (slower > last) return (Residual){v, u, 0, 0};
    return (Residual){v, u, s->length[slower] - between, s->flow[a] - s->steepness[slower]};
}

/* Pushes flow along a residual arc; true when that used up its capacity. */
static int push(Solver *s, int32_t coded, int64_t amount) {
    const int32_t a = coded >> 1;
    if (!(coded & 1)) {
        const int32_t first = s->first_knot[s->curve[a]];
        s->flow[a] += amount;
        if (s->knot[a] == first || s->flow[a] < s->steepness[s->knot[a] - 1]) return 0;
        s->knot[a]--;
        return 1;
    }
    if (s->flow[a] == s->steepness[s->knot[a]]) s->knot[a]++;
    s->flow[a] -= amount;
    return s->flow[a] == s->steepness[s->knot[a]];
}

/* ---- the heap ---- */

static void heap_put(Solver *s, int32_t at, int32_t node) {
    s->heap[at] = node;
    s->place[node] = at;
}

static void heap_up(Solver *s, int32_t at) {
    const int32_t node = s->heap[at];
    while (at > 0 && s->due[s->heap[(at - 1) / 2]] > s->due[node]) {
        heap_put(s, at, s->heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    heap_put(s, at, node);
}

static void heap_down(Solver *s, int32_t at) {
    const int32_t node = s->heap[at];
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= s->heap_size) break;
        if (child + 1 < s->heap_size && s->due[s->heap[child + 1]] < s->due[s->heap[child]]) child++;
        if (s->due[s->heap[child]] >= s->due[node]) break;
        heap_put(s, at, s->heap[child]);
        at = child;
    }
    heap_put(s, at, node);
}

static void heap_remove(Solver *s, int32_t node) {
    const int32_t at = s->place[node];
    if (at == NONE) return;
    s->place[node] = NONE;
    const int32_t moved = s->heap[--s->heap_size];
    if (moved == node) return;
    heap_put(s, at, moved);
    heap_up(s, at);
    heap_down(s, s->place[moved]);
}

static void heap_offer(Solver *s, int32_t node, int64_t due, int32_t via) {
    if (s->place[node] == NONE)
        heap_put(s, s->heap_size++, node);
    else if (due >= s->due[node])
        return;
    s->due[node] = due;
    s->via[node] = via;
    heap_up(s, s->place[node]);
}

/* ---- the search tree ---- */

static void reach(Solver *s, int32_t node, int32_t parent_arc) {
    heap_remove(s, node);
    s->reached[node] = 1;
    s->moment[node] -= s->shift;
    s->parent_arc[node] = parent_arc;
    s->first_child[node] = NONE;
    s->queue[s->queue_end++] = node;
    if (parent_arc == NONE) return;
    const int32_t parent = parent_arc & 1 ? s->head[parent_arc >> 1] : s->tail[parent_arc >> 1];
    const int32_t sibling = s->first_child[parent];
    s->previous_sibling[node] = NONE;
    s->next_sibling[node] = sibling;
    if (sibling != NONE) s->previous_sibling[sibling] = node;
    s->first_child[parent] = node;
}

/* Reaches whatever can be reached now; what can be later waits in the heap. Stops early when the sink is reached. */
static void grow(Solver *s) {
    while (s->queue_begin < s->queue_end && !s->reached[s->sink]) {
        const int32_t node = s->queue[s->queue_begin++];
        for (int32_t i = s->first_incident[node]; i < s->first_incident[node + 1]; i++) {
            const int32_t coded = s->incident[i], a = coded >> 1;
            if (s->reached[coded & 1 ? s->tail[a] : s->head[a]]) continue;
            const Residual r = residual(s, coded);
            if (r.capacity == 0) continue;
            if (r.slack == 0)
                reach(s, r.to, coded);
            else
                heap_offer(s, r.to, r.slack + s->shift, coded);
        }
    }
}

/* Finds the soonest way into a node not reached from the nodes that are. Reaches it at once where the way is free. */
static void look_for_parent(Solver *s, int32_t node) {
    for (int32_t i = s->first_incident[node]; i < s->first_incident[node + 1]; i++) {
        const int32_t coded = s->incident[i] ^ 1, a = coded >> 1;
        if (!s->reached[coded & 1 ? s->head[a] : s->tail[a]]) continue;
        const Residual r = residual(s, coded);
        if (r.capacity == 0) continue;
        if (r.slack == 0) {
            reach(s, node, coded);
            return;
        }
        heap_offer(s, node, r.slack + s->shift, coded);
    }
}

/* Cuts off the subtree at `top` and searches its nodes anew. Nodes queued but not yet grown stay queued if still reached. */
static void cut_off(Solver *s, int32_t top, int32_t *orphans) {
    int32_t num_orphans = 0;
    if (s->previous_sibling[top] != NONE)
        s->next_sibling[s->previous_sibling[top]] = s->next_sibling[top];
    else {
        const int32_t arc = s->parent_arc[top];
        s->first_child[arc & 1 ? s->head[arc >> 1] : s->tail[arc >> 1]] = s->next_sibling[top];
    }
    if (s->next_sibling[top] != NONE) s->previous_sibling[s->next_sibling[top]] = s->previous_sibling[top];
    orphans[num_orphans++] = top;
    for (int32_t i = 0; i < num_orphans; i++) {
        s->reached[orphans[i]] = 0;
        s->moment[orphans[i]] += s->shift;
        for (int32_t child = s->first_child[orphans[i]]; child != NONE; child = s->next_sibling[child])
            orphans[num_orphans++] = child;
    }
    int32_t kept = 0;
    for (int32_t i = s->queue_begin; i < s->queue_end; i++)
        if (s->reached[s->queue[i]]) s->queue[kept++] = s->queue[i];
    s->queue_begin = 0;
    s->queue_end = kept;
    for (int32_t i = 0; i < num_orphans; i++)
        if (!s->reached[orphans[i]]) look_for_parent(s, orphans[i]);
}

/* Sends as much flow as possible along the tree path to the sink; false when nothing bounds it. */
static int augment(Solver *s, int32_t *orphans) {
    int64_t amount = UNBOUNDED;
    int32_t top = NONE;
    for (int32_t node = s->sink; node != s->source;) {
        const Residual r = residual(s, s->parent_arc[node]);
        if (r.capacity < amount) amount = r.capacity;
        node = r.from;
    }
    if (amount == UNBOUNDED) return 0;
    s->value += amount;
    for (int32_t node = s->sink; node != s->source;) {
        const int32_t coded = s->parent_arc[node];
        if (push(s, coded, amount)) top = node;
        node = coded & 1 ? s->head[coded >> 1] : s->tail[coded >> 1];
    }
    cut_off(s, top, orphans);
    return 1;
}

/* The next shift at which a node is reached, and that node; lower bounds that no longer hold are corrected on the way. */
static int32_t next_due(Solver *s) {
    for (;;) {
        const int32_t node = s->heap[0], coded = s->via[node];
        const int32_t from = coded & 1 ? s->head[coded >> 1] : s->tail[coded >> 1];
        if (s->reached[from]) {
            const Residual r = residual(s, coded);
            if (r.capacity > 0 && r.slack + s->shift == s->due[node]) return node;
        }
        heap_remove(s, node);
        look_for_parent(s, node);
        if (s->queue_begin < s->queue_end || s->heap_size == 0) return NONE;
    }
}

/* ---- what is handed back ---- */

typedef struct {
    char *bytes;
    size_t size, room;
} Buffer;

static int append(Buffer *b, const void *data, size_t size) {
    if (b->size + size > b->room) {
        const size_t room = 2 * b->room + size;
        char *bytes = realloc(b->bytes, room);
        if (!bytes) return 0;
        b->bytes = bytes;
        b->room = room;
    }
    memcpy(b->bytes + b->size, data, size);
    b->size += size;
    return 1;
}

typedef struct {
    Buffer length;   /* int64 per vertex: T */
    Buffer value;    /* int64 per vertex: flow on the segment that starts there and goes to shorter T */
    Buffer kept;     /* int32 per snapshot: its vertex */
    Buffer snapshot; /* int64 per snapshot and recorded arc: its length */
    int32_t num_vertices;
    int64_t last_value, kept_length;
    double deviation; /* bound on how far the chord from the last snapshot lies above the frontier */
} Record;

static int64_t total_length(const Solver *s) {
    return s->moment[s->sink] - (s->reached[s->sink] ? 0 : s->shift) - s->moment[s->source];
}

static int64_t arc_length(const Solver *s, int32_t a) {
    const int32_t u = s->tail[a], v = s->head[a];
    const int64_t slowest = s->length[s->first_knot[s->curve[a] + 1] - 1];
    const int64_t between = s->moment[v] - (s->reached[v] ? 0 : s->shift) - s->moment[u] + (s->reached[u] ? 0 : s->shift);
    return between < slowest ? between : slowest;
}

/* Records the vertex the solver stands at. The lengths are kept where, without them, interpolating between the
 * snapshots on either side could cost more than `tolerance`: a change of slope by df at distance x from the last snapshot lifts
 * the chord by at most df * x. */
static int record(const Solver *s, Record *r, int32_t num_recorded, double tolerance, int final) {
    const int64_t total = total_length(s);
    const int first = r->num_vertices == 0;
    if (!append(&r->length, &total, sizeof total) || !append(&r->value, &s->value, sizeof total)) return 0;
    const double lift = first ? 0 : (double)(s->value - r->last_value) * (double)(r->kept_length - total);
    r->last_value = s->value;
    if (first || final || r->deviation + lift > tolerance) {
        if (!append(&r->kept, &r->num_vertices, sizeof r->num_vertices)) return 0;
        for (int32_t a = 0; a < num_recorded; a++) {
            const int64_t length = arc_length(s, a);
            if (!append(&r->snapshot, &length, sizeof length)) return 0;
        }
        r->kept_length = total;
        r->deviation = 0;
    } else
        r->deviation += lift;
    r->num_vertices++;
    return 1;
}

/* ---- the whole run ---- */

enum { FINISHED, OUT_OF_MEMORY, INTERRUPTED };

static int trace(Solver *s, Record *r, int32_t *orphans, int64_t until, int64_t min_value, int32_t num_recorded,
                 double tolerance, PyObject *progress, PyThreadState **thread) {
    uint32_t steps = 0;
    reach(s, s->source, NONE);
    for (;;) {
        grow(s);
        if (s->reached[s->sink]) {
            if (++steps % 4096 == 0 && progress != Py_None) {
                PyEval_RestoreThread(*thread);
                PyObject *answer = PyObject_CallFunction(progress, "L", (long long)total_length(s));
                const int stop = !answer || PyErr_CheckSignals() < 0;
                Py_XDECREF(answer);
                *thread = PyEval_SaveThread();
                if (stop) return INTERRUPTED;
            }
            if (!augment(s, orphans)) break;
            continue;
        }
        const int32_t node = next_due(s);
        if (node == NONE) continue;
        if (s->value >= min_value) {
            const int64_t last_shift = s->moment[s->sink] - s->moment[s->source] - until;
            if (s->shift >= last_shift) break;
            if (r->num_vertices == 0 || s->value != r->last_value)
                if (!record(s, r, num_recorded, tolerance, 0)) return OUT_OF_MEMORY;
            if (s->due[node] >= last_shift) {
                s->shift = last_shift;
                break;
            }
        }
        s->shift = s->due[node];
        reach(s, node, s->via[node]);
    }
    return record(s, r, num_recorded, tolerance, 1) ? FINISHED : OUT_OF_MEMORY;
}

static int index_incident_arcs(Solver *s) {
    for (int32_t a = 0; a < s->num_arcs; a++) {
        s->first_incident[s->tail[a] + 1]++;
        s->first_incident[s->head[a] + 1]++;
    }
    for (int32_t v = 0; v < s->num_nodes; v++) s->first_incident[v + 1] += s->first_incident[v];
    int32_t *next = malloc((size_t)s->num_nodes * sizeof *next);
    if (!next) return 0;
    memcpy(next, s->first_incident, (size_t)s->num_nodes * sizeof *next);
    for (int32_t a = 0; a < s->num_arcs; a++) {
        s->incident[next[s->tail[a]]++] = 2 * a;
        s->incident[next[s->head[a]]++] = 2 * a + 1;
    }
    free(next);
    return 1;
}

static PyObject *as_bytes(const void *data, size_t size) {
    return PyBytes_FromStringAndSize(data ? data : "", (Py_ssize_t)size);
}

const char trace_frontier_doc[] =
    "trace_frontier(tail, head, curve, first_knot, length, steepness, moment, source, sink, until, min_value, tolerance,\n"
    "               num_recorded, progress, /)\n\n"
    "Traces the frontier from the longest T down to `until`, or to where T cannot shrink.\n\n"
    "tail, head, curve, first_knot: int32 arrays; length, steepness, moment: int64 arrays. moment: where each node lies when\n"
    "every arc is at its slowest. Vertices are recorded from the first flow of min_value on; lengths of the first num_recorded\n"
    "arcs are kept often enough that interpolating them costs at most `tolerance`. progress: None or a callable that takes T.\n\n"
    "Returns bytes: T per vertex, flow per vertex, vertex per snapshot, lengths per snapshot, final moments, final flow per arc.";

PyObject *trace_frontier(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer tail, head, curve, first_knot, length, steepness, moment;
    long long until, min_value;
    int source, sink, num_recorded;
    double tolerance;
    PyObject *progress, *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*iiLLdiO", &tail, &head, &curve, &first_knot, &length, &steepness, &moment,
                          &source, &sink, &until, &min_value, &tolerance, &num_recorded, &progress))
        return NULL;

    const size_t n = (size_t)moment.len / sizeof(int64_t), m = (size_t)tail.len / sizeof(int32_t);
    Solver s = {
        .num_nodes = (int32_t)n, .num_arcs = (int32_t)m, .source = source, .sink = sink,
        .tail = tail.buf, .head = head.buf, .curve = curve.buf, .first_knot = first_knot.buf,
        .length = length.buf, .steepness = steepness.buf,
        .first_incident = calloc(n + 1, sizeof(int32_t)), .incident = malloc(2 * m * sizeof(int32_t)),
        .flow = calloc(m, sizeof(int64_t)), .knot = malloc(m * sizeof(int32_t)),
        .reached = calloc(n, 1), .parent_arc = malloc(n * sizeof(int32_t)), .first_child = malloc(n * sizeof(int32_t)),
        .next_sibling = malloc(n * sizeof(int32_t)), .previous_sibling = malloc(n * sizeof(int32_t)),
        .moment = malloc(n * sizeof(int64_t)), .queue = malloc(n * sizeof(int32_t)),
        .heap = malloc(n * sizeof(int32_t)), .place = malloc(n * sizeof(int32_t)), .via = malloc(n * sizeof(int32_t)),
        .due = malloc(n * sizeof(int64_t)),
    };
    int32_t *orphans = malloc(n * sizeof(int32_t));
    Record r = {0};
    int outcome = OUT_OF_MEMORY;
    if (s.first_incident && s.incident && s.flow && s.knot && s.reached && s.parent_arc && s.first_child && s.next_sibling &&
        s.previous_sibling && s.moment && s.queue && s.heap && s.place && s.via && s.due && orphans && index_incident_arcs(&s)) {
        memcpy(s.moment, moment.buf, n * sizeof(int64_t));
        for (size_t a = 0; a < m; a++) s.knot[a] = s.first_knot[s.curve[a] + 1] - 1;
        for (size_t v = 0; v < n; v++) s.place[v] = NONE;
        PyThreadState *thread = PyEval_SaveThread();
        outcome = trace(&s, &r, orphans, until, min_value, num_recorded, tolerance, progress, &thread);
        PyEval_RestoreThread(thread);
    }
    if (outcome == FINISHED) {
        for (size_t v = 0; v < n; v++)
            if (!s.reached[v]) s.moment[v] -= s.shift;
        result = Py_BuildValue("NNNNNN", as_bytes(r.length.bytes, r.length.size), as_bytes(r.value.bytes, r.value.size),
                               as_bytes(r.kept.bytes, r.kept.size), as_bytes(r.snapshot.bytes, r.snapshot.size),
                               as_bytes(s.moment, n * sizeof(int64_t)), as_bytes(s.flow, m * sizeof(int64_t)));
    } else if (outcome == OUT_OF_MEMORY)
        PyErr_NoMemory();

    void *owned[] = {s.first_incident, s.incident, s.flow, s.knot, s.reached, s.parent_arc, s.first_child, s.next_sibling,
                     s.previous_sibling, s.moment, s.queue, s.heap, s.place, s.via, s.due, orphans,
                     r.length.bytes, r.value.bytes, r.kept.bytes, r.snapshot.bytes};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    Py_buffer *views[] = {&tail, &head, &curve, &first_knot, &length, &steepness, &moment};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) PyBuffer_Release(views[i]);
    return result;
}
