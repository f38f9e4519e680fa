/* A project network with its flow: what the frontier tracer and the fixed-time solver share.
 *
 * Nodes are moments. Arc a runs from its tail to its head and carries a convex, decreasing, piecewise-linear curve of cost
 * over length: knots (lengths, ascending) and steepness (cost saved per unit of length from a knot to the next slower one,
 * strictly descending, 0 at the slowest knot). A plain dependency is an arc of one knot. Moments and flow are optimal
 * together when for every arc
 *
 *     at knot k                  steepness[k] <= flow <= steepness[k - 1] (unbounded at the fastest)
 *     strictly between knots     flow = steepness there
 *     longer than the slowest    flow = 0
 *
 * In terms of a residual network: an arc can always be walked forward, flow rising; the length it will then have must not
 * exceed the time between its ends. An arc with flow can be walked backward, flow falling; the length it will then have
 * must not be below that time. The difference is the slack; it is never negative when the conditions hold.
 */
#ifndef PERSEUS_NETWORK_H
#define PERSEUS_NETWORK_H

#include "native.h"

#define UNBOUNDED INT64_MAX

typedef struct {
    int32_t tail, head;
    int32_t fastest, slowest; /* first and last knot of its curve */
    int32_t knot;             /* where the flow may rise: steepness[knot] <= flow < steepness[knot - 1] */
    int64_t flow;
} Arc;

/* One end of an arc, seen from a node. A way is coded as arc * 2, plus 1 for the way backward. */
typedef struct {
    int32_t way, neighbour;
} Incidence;

typedef struct {
    int32_t num_nodes, num_arcs;
    Arc *arcs;
    const int64_t *length, *steepness; /* per knot */
    int32_t *first_incidence;          /* per node, into incidences */
    Incidence *incidences;             /* ways that leave the node; way ^ 1 enters it */
} Network;

/* Builds the network with flow 0, every arc at its slowest knot; false when memory runs out. */
int network_init(Network *net, int32_t num_nodes, int32_t num_arcs, const int32_t *tail, const int32_t *head,
                 const int32_t *curve, const int32_t *first_knot, const int64_t *length, const int64_t *steepness);
void network_free(Network *net);

/* The flow per arc, as int64 bytes; NULL with an exception set when memory runs out. */
PyObject *network_flow(const Network *net);

static inline int is_backward(int32_t way) { return way & 1; }

static inline int32_t way_from(const Network *net, int32_t way) {
    const Arc *arc = &net->arcs[way >> 1];
    return is_backward(way) ? arc->head : arc->tail;
}

/* The knot to which walking backward leads. */
static inline int32_t slower_knot(const Network *net, const Arc *arc) {
    return arc->flow > net->steepness[arc->knot] ? arc->knot : arc->knot + 1;
}

static inline int walkable(const Network *net, int32_t way) { return !is_backward(way) || net->arcs[way >> 1].flow > 0; }

/* Slack of a walkable way, for the time between where it starts and where it leads (not tail and head). */
static inline int64_t slack(const Network *net, int32_t way, int64_t between) {
    const Arc *arc = &net->arcs[way >> 1];
    return between + (is_backward(way) ? net->length[slower_knot(net, arc)] : -net->length[arc->knot]);
}

/* How much flow can be pushed along a way before the arc changes its knot. */
static inline int64_t capacity(const Network *net, int32_t way) {
    const Arc *arc = &net->arcs[way >> 1];
    if (is_backward(way)) return arc->flow - net->steepness[slower_knot(net, arc)];
    return arc->knot == arc->fastest ? UNBOUNDED : net->steepness[arc->knot - 1] - arc->flow;
}

/* Pushes flow along a way; true when that used up its capacity. */
static inline int push(Network *net, int32_t way, int64_t amount) {
    Arc *arc = &net->arcs[way >> 1];
    if (is_backward(way)) {
        arc->knot = slower_knot(net, arc);
        arc->flow -= amount;
        return arc->flow == net->steepness[arc->knot];
    }
    arc->flow += amount;
    if (arc->knot == arc->fastest || arc->flow < net->steepness[arc->knot - 1]) return 0;
    arc->knot--;
    return 1;
}

#endif
