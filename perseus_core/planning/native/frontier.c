/* The exact time - cost frontier of a project network: the primal-dual method of Fulkerson (1961) and Kelley (1961).
 *
 * Wanted, for every T between the longest path of all-slowest and of all-fastest lengths: the cheapest moments with
 * moment[sink] - moment[source] = T. The linear-programming dual is a flow from source to sink; its value is the slope of the
 * frontier, -dCost/dT. network.h says when moments and flow are optimal together.
 *
 * A walk over ways of slack 0 from source to sink carries more flow. When there is none, the nodes that reach the sink form one
 * side of a cut and move earlier together, until a way across the cut loses its slack. That shortens T at the constant slope
 * of the flow. A walk whose flow nothing bounds ends it all: some path is at its fastest throughout.
 *
 * Two search trees, of what the source reaches and of what reaches the sink, survive from step to step (as in Boykov and
 * Kolmogorov 2004): after an augmentation only what hung below a saturated arc is searched again. Moments of the sink's
 * tree are stored with a shift that is common to them all, so moving them costs nothing.
 *
 * All numbers are integers: slack 0 is exact, flow conservation is exact, termination needs no tolerance. The caller scales
 * seconds and watts to integers far finer than any measurement. The tracer runs without Python's global lock.
 */
#include "heap.h"
#include "network.h"

enum { FREE, FROM_SOURCE, TO_SINK };

typedef struct {
    int32_t way; /* from the parent in the source's tree, to the parent in the sink's; NONE at a root */
    int32_t parent, first_child, next_sibling, previous_sibling;
} TreeNode;

typedef struct {
    Network net;
    int32_t source, sink;
    int64_t value; /* of the whole flow */

    uint8_t *side; /* per node: the tree it belongs to */
    TreeNode *tree;
    int64_t *moment; /* of a node in the sink's tree: moment + shift */
    int64_t shift;
    Heap waiting; /* nodes of the sink's tree, by a lower bound of the shift at which a way from outside is free */

    int32_t *queue; /* a ring: nodes of both trees with neighbours to look at, and orphans that were */
    int32_t queue_begin, queue_size;
    uint8_t *queued;
    int32_t *orphans;
    int32_t num_orphans;
} Tracer;

/* ---- the search trees ---- */

static void join(Tracer *t, int32_t node, uint8_t side, int32_t parent, int32_t way) {
    t->side[node] = side;
    if (side == TO_SINK) t->moment[node] += t->shift;
    if (!t->queued[node]) {
        const int32_t end = t->queue_begin + t->queue_size++;
        t->queue[end < t->net.num_nodes ? end : end - t->net.num_nodes] = node;
        t->queued[node] = 1;
    }
    t->tree[node] = (TreeNode){way, parent, NONE, NONE, NONE};
    if (parent == NONE) return;
    const int32_t sibling = t->tree[parent].first_child;
    if (sibling != NONE) t->tree[sibling].previous_sibling = node;
    t->tree[node].next_sibling = sibling;
    t->tree[parent].first_child = node;
}

static void detach(Tracer *t, int32_t node) {
    const TreeNode *at = &t->tree[node];
    if (at->previous_sibling != NONE)
        t->tree[at->previous_sibling].next_sibling = at->next_sibling;
    else
        t->tree[at->parent].first_child = at->next_sibling;
    if (at->next_sibling != NONE) t->tree[at->next_sibling].previous_sibling = at->previous_sibling;
}

/* Slack of a way; where it leads into the sink's tree from outside, the shift at which it has none left. */
static int64_t slack_between(const Tracer *t, int32_t way, int32_t from, int32_t to) {
    return slack(&t->net, way, t->moment[to] - t->moment[from]);
}

/* Lets both trees take in what they can. Returns a free way from the source's tree to the sink's, or NONE. */
static int32_t grow(Tracer *t) {
    while (t->queue_size > 0) {
        const int32_t node = t->queue[t->queue_begin];
        const uint8_t side = t->side[node];
        for (int32_t i = t->net.first_incidence[node]; side != FREE && i < t->net.first_incidence[node + 1]; i++) {
            const int32_t other = t->net.incidences[i].neighbour;
            if (t->side[other] == side) continue;
            if (side == FROM_SOURCE) {
                const int32_t way = t->net.incidences[i].way;
                if (!walkable(&t->net, way)) continue;
                const int64_t room = slack_between(t, way, node, other);
                if (t->side[other] == FREE) {
                    if (room == 0) join(t, other, FROM_SOURCE, node, way);
                } else if (room == t->shift)
                    return way;
                else
                    heap_offer(&t->waiting, other, room, way);
            } else {
                const int32_t way = t->net.incidences[i].way ^ 1;
                if (!walkable(&t->net, way)) continue;
                const int64_t room = slack_between(t, way, other, node);
                if (room > t->shift)
                    heap_offer(&t->waiting, node, room, way);
                else if (t->side[other] == FROM_SOURCE)
                    return way;
                else
                    join(t, other, TO_SINK, node, way);
            }
        }
        t->queued[node] = 0;
        t->queue_size--;
        if (++t->queue_begin == t->net.num_nodes) t->queue_begin = 0;
    }
    return NONE;
}

/* Takes a subtree apart. */
static void cut_off(Tracer *t, int32_t top) {
    detach(t, top);
    int32_t next = t->num_orphans;
    t->orphans[t->num_orphans++] = top;
    for (; next < t->num_orphans; next++) {
        const int32_t node = t->orphans[next];
        if (t->side[node] == TO_SINK) {
            heap_remove(&t->waiting, node);
            t->moment[node] -= t->shift;
        }
        t->side[node] = FREE;
        for (int32_t child = t->tree[node].first_child; child != NONE; child = t->tree[child].next_sibling)
            t->orphans[t->num_orphans++] = child;
    }
}

/* Finds a free node its place in a tree, if it has one. */
static void settle(Tracer *t, int32_t node) {
    for (int32_t i = t->net.first_incidence[node]; i < t->net.first_incidence[node + 1]; i++) {
        const int32_t other = t->net.incidences[i].neighbour, way = t->net.incidences[i].way;
        if (t->side[other] == FROM_SOURCE && walkable(&t->net, way ^ 1) && slack_between(t, way ^ 1, other, node) == 0) {
            join(t, node, FROM_SOURCE, other, way ^ 1);
            return;
        }
        if (t->side[other] == TO_SINK && walkable(&t->net, way)) {
            const int64_t due = slack_between(t, way, node, other);
            if (due == t->shift) {
                join(t, node, TO_SINK, other, way);
                return;
            }
            heap_offer(&t->waiting, other, due, way);
        }
    }
}

/* Sends as much flow as possible over a way from tree to tree; false when nothing bounds it. */
static int augment(Tracer *t, int32_t way) {
    const int32_t last_of_source = way_from(&t->net, way), first_of_sink = way_from(&t->net, way ^ 1);
    int64_t amount = capacity(&t->net, way);
    const int32_t leaves[] = {last_of_source, first_of_sink};
    for (int side = 0; side < 2; side++)
        for (const TreeNode *at = &t->tree[leaves[side]]; at->way != NONE; at = &t->tree[at->parent]) {
            const int64_t most = capacity(&t->net, at->way);
            if (most < amount) amount = most;
        }
    if (amount == UNBOUNDED) return 0;
    t->value += amount;
    push(&t->net, way, amount);
    t->num_orphans = 0;
    for (int side = 0; side < 2; side++) {
        int32_t top = NONE;
        for (int32_t node = leaves[side]; t->tree[node].way != NONE; node = t->tree[node].parent)
            if (push(&t->net, t->tree[node].way, amount)) top = node;
        if (top != NONE) cut_off(t, top);
    }
    for (int32_t i = 0; i < t->num_orphans; i++)
        if (t->side[t->orphans[i]] == FREE) settle(t, t->orphans[i]);
    return 1;
}

/* The next way into the sink's tree that becomes free; lower bounds that no longer hold are corrected on the way. */
static HeapEntry next_due(Tracer *t) {
    for (;;) {
        const HeapEntry next = t->waiting.entries[0];
        const int32_t node = next.node, from = way_from(&t->net, next.via);
        if (t->side[from] != TO_SINK && walkable(&t->net, next.via) && slack_between(t, next.via, from, node) == next.due)
            return next;
        heap_remove(&t->waiting, node);
        for (int32_t i = t->net.first_incidence[node]; i < t->net.first_incidence[node + 1]; i++) {
            const int32_t other = t->net.incidences[i].neighbour, way = t->net.incidences[i].way ^ 1;
            if (t->side[other] != TO_SINK && walkable(&t->net, way))
                heap_offer(&t->waiting, node, slack_between(t, way, other, node), way);
        }
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

static int64_t moment_now(const Tracer *t, int32_t node) { return t->moment[node] - (t->side[node] == TO_SINK ? t->shift : 0); }

static int64_t total_length(const Tracer *t) { return moment_now(t, t->sink) - moment_now(t, t->source); }

static int64_t length_now(const Tracer *t, const Arc *arc) {
    const int64_t between = moment_now(t, arc->head) - moment_now(t, arc->tail), slowest = t->net.length[arc->slowest];
    return between < slowest ? between : slowest;
}

/* Records the vertex the solver stands at. The lengths are kept where, without them, interpolating between the
 * snapshots on either side could cost more than `tolerance`: a change of slope by df at distance x from the last snapshot lifts
 * the chord by at most df * x. */
static int record(const Tracer *t, Record *r, int32_t num_recorded, double tolerance, int final) {
    const int64_t total = total_length(t);
    const int first = r->num_vertices == 0;
    if (!append(&r->length, &total, sizeof total) || !append(&r->value, &t->value, sizeof total)) return 0;
    const double lift = first ? 0 : (double)(t->value - r->last_value) * (double)(r->kept_length - total);
    r->last_value = t->value;
    if (first || final || r->deviation + lift > tolerance) {
        if (!append(&r->kept, &r->num_vertices, sizeof r->num_vertices)) return 0;
        for (int32_t a = 0; a < num_recorded; a++) {
            const int64_t length = length_now(t, &t->net.arcs[a]);
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

/* In nodes looked at: a hundredth of a second or two. */
#define WORK_PER_AUGMENTATION 64
#define WORK_BETWEEN_REPORTS 300000

static int trace(Tracer *t, Record *r, int64_t until, int64_t min_value, int32_t num_recorded, double tolerance,
                 PyObject *progress, PyThreadState **thread) {
    int64_t work = 0;
    join(t, t->source, FROM_SOURCE, NONE, NONE);
    join(t, t->sink, TO_SINK, NONE, NONE);
    for (;;) {
        int32_t way = grow(t);
        if (way == NONE) {
            const HeapEntry next = next_due(t);
            if (t->value >= min_value) {
                const int64_t last_shift = t->moment[t->sink] - t->moment[t->source] - until;
                if (t->shift >= last_shift) break;
                if (next.due > t->shift && (r->num_vertices == 0 || t->value != r->last_value))
                    if (!record(t, r, num_recorded, tolerance, 0)) return OUT_OF_MEMORY;
                if (next.due >= last_shift) {
                    t->shift = last_shift;
                    break;
                }
            }
            t->shift = next.due;
            const int32_t from = way_from(&t->net, next.via);
            if (t->side[from] == FREE) {
                join(t, from, TO_SINK, next.node, next.via);
                continue;
            }
            way = next.via;
        }
        work += WORK_PER_AUGMENTATION + t->num_orphans;
        if (work > WORK_BETWEEN_REPORTS) {
            work = 0;
            if (!report(progress, total_length(t), thread)) return INTERRUPTED;
        }
        if (!augment(t, way)) break;
    }
    return record(t, r, num_recorded, tolerance, 1) ? FINISHED : OUT_OF_MEMORY;
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
    Tracer t = {
        .source = source, .sink = sink, .side = calloc(n, 1), .queued = calloc(n, 1), .tree = malloc(n * sizeof(TreeNode)),
        .moment = malloc(n * sizeof(int64_t)), .queue = malloc(n * sizeof(int32_t)), .orphans = malloc(n * sizeof(int32_t)),
    };
    Record r = {0};
    int outcome = OUT_OF_MEMORY;
    const int has_room = network_init(&t.net, (int32_t)n, (int32_t)m, tail.buf, head.buf, curve.buf, first_knot.buf, length.buf,
                                      steepness.buf) &
                         heap_init(&t.waiting, (int32_t)n);
    if (has_room && t.side && t.queued && t.tree && t.moment && t.queue && t.orphans) {
        memcpy(t.moment, moment.buf, n * sizeof(int64_t));
        PyThreadState *thread = PyEval_SaveThread();
        outcome = trace(&t, &r, until, min_value, num_recorded, tolerance, progress, &thread);
        PyEval_RestoreThread(thread);
    }
    if (outcome == FINISHED) {
        for (size_t v = 0; v < n; v++) t.moment[v] = moment_now(&t, (int32_t)v);
        result = Py_BuildValue("NNNNNN", as_bytes(r.length.bytes, r.length.size), as_bytes(r.value.bytes, r.value.size),
                               as_bytes(r.kept.bytes, r.kept.size), as_bytes(r.snapshot.bytes, r.snapshot.size),
                               as_bytes(t.moment, n * sizeof(int64_t)), network_flow(&t.net));
    } else if (outcome == OUT_OF_MEMORY)
        PyErr_NoMemory();

    network_free(&t.net);
    heap_free(&t.waiting);
    void *owned[] = {t.side, t.queued, t.tree, t.moment, t.queue, t.orphans, r.length.bytes, r.value.bytes, r.kept.bytes,
                     r.snapshot.bytes};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    Py_buffer *views[] = {&tail, &head, &curve, &first_knot, &length, &steepness, &moment};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) PyBuffer_Release(views[i]);
    return result;
}
