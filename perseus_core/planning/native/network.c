/* Building and freeing a network; its meaning is explained in network.h. */
#include "network.h"

int network_init(Network *net, int32_t num_nodes, int32_t num_arcs, const int32_t *tail, const int32_t *head,
                 const int32_t *curve, const int32_t *first_knot, const int64_t *length, const int64_t *steepness) {
    const size_t n = (size_t)num_nodes, m = (size_t)num_arcs;
    int32_t *next = malloc((n + 1) * sizeof *next);
    *net = (Network){
        .num_nodes = num_nodes, .num_arcs = num_arcs, .arcs = malloc(m * sizeof(Arc)), .length = length,
        .steepness = steepness, .first_incidence = calloc(n + 1, sizeof(int32_t)),
        .incidences = malloc(2 * m * sizeof(Incidence)),
    };
    if (!next || !net->arcs || !net->first_incidence || !net->incidences) {
        free(next);
        return 0;
    }
    for (size_t a = 0; a < m; a++) {
        const int32_t slowest = first_knot[curve[a] + 1] - 1;
        net->arcs[a] = (Arc){tail[a], head[a], first_knot[curve[a]], slowest, slowest, 0};
        net->first_incidence[tail[a] + 1]++;
        net->first_incidence[head[a] + 1]++;
    }
    for (size_t v = 0; v < n; v++) net->first_incidence[v + 1] += net->first_incidence[v];
    memcpy(next, net->first_incidence, (n + 1) * sizeof *next);
    for (size_t a = 0; a < m; a++) {
        net->incidences[next[tail[a]]++] = (Incidence){(int32_t)(2 * a), head[a]};
        net->incidences[next[head[a]]++] = (Incidence){(int32_t)(2 * a + 1), tail[a]};
    }
    free(next);
    return 1;
}

void network_free(Network *net) {
    free(net->arcs);
    free(net->first_incidence);
    free(net->incidences);
}

PyObject *network_flow(const Network *net) {
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)((size_t)net->num_arcs * sizeof(int64_t)));
    if (bytes) {
        int64_t *flow = (int64_t *)PyBytes_AS_STRING(bytes);
        for (int32_t a = 0; a < net->num_arcs; a++) flow[a] = net->arcs[a].flow;
    }
    return bytes;
}
