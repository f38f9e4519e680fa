/* An iteration in which changes of clock take time, and what it costs. */
#ifndef PERSEUS_SWITCHING_H
#define PERSEUS_SWITCHING_H

#include "native.h"

/* A change of clock that was asked for. */
typedef struct {
    double asked, at; /* when it is asked for, and in force */
    int32_t clock;
} Change;

/* What a stage's GPU does about its clock. A change is asked for when the one before it is in force and its call has returned,
 * so of those not in force yet one is on its way, and another may be waiting for it. */
typedef struct {
    int32_t clock, num_pending;
    Change pending[2];
    double free_at; /* when another change may be asked for */
} Gpu;

typedef struct {
    double up, down; /* from asking for a higher, or a lower, clock until it is in force */
    double call;     /* from asking until another change may be asked for, though the first be in force before */
    double jitter;   /* a rise is asked for so much earlier, and a fall so much later, than would do if all were certain */
} Latency;

/* Nodes are numbered in a topological order; arrays have one entry for each, if nothing else is said. */
typedef struct {
    int32_t num_nodes, num_stages, num_clocks;
    const int32_t *first_predecessor, *predecessor; /* num_nodes + 1; edges grouped by the node they lead to */
    const double *predecessor_latency;
    const int32_t *stage, *type;
    const int32_t *before, *behind; /* its neighbours on its stage; the last one is followed by the first */
    const int32_t *first_node;      /* per stage */
    const double *time, *cost;      /* per type and clock */
    Latency latency;
    double outside, waiting_power; /* time of an iteration outside the pipeline; power of all stages that wait */
    double *least_tail;            /* from a node's end to the iteration's, if all that follows is at its fastest */

    int32_t *clock;
    double *end, *duration, *spent;
    double *length_to, *total_to; /* of all nodes up to this one: the latest end, and the sum of costs */
    Gpu *gpu_before;              /* the node's GPU when the node begins */
    Gpu *first, *last;            /* per stage: its GPU when the iteration begins, and when it ends */
    Gpu *first_of_longest;        /* the same when the longest one begins, where iterations differ */
    uint8_t *is_found;            /* per stage, scratch */
} Pipeline;

/* Nodes begin .. end - 1 were run anew; whether that was given up. */
typedef struct {
    int32_t begin, end;
    int is_given_up;
} Rerun;

/* How long it takes at least from a node's end to the iteration's. */
void settle_least_tails(Pipeline *p);

/* Runs iterations from this node on, with what is known of those before, until one follows another like it. Given up when it is
 * certain that an iteration takes longer than `limit`, or when that takes many of them. */
Rerun run_steadily(Pipeline *p, int32_t node, double limit);

/* Runs iterations until one follows another like it; where they alternate for ever, the longest of them. */
void run_until_steady(Pipeline *p);

static inline double length_of(const Pipeline *p) { return p->length_to[p->num_nodes - 1]; }

static inline double energy_of(const Pipeline *p) { return p->total_to[p->num_nodes - 1] + p->waiting_power * length_of(p); }

#endif
