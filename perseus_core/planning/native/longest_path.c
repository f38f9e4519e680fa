/* Orders and longest paths of a DAG given as edges. */
#include "native.h"

const char topological_order_doc[] =
    "topological_order(num_nodes, predecessor, successor, /)\n\n"
    "Nodes (int32 bytes) ordered so that every edge leads forward (Kahn 1962); fewer than num_nodes if there is a cycle.";

PyObject *topological_order(PyObject *module, PyObject *args) {
    (void)module;
    int num_nodes;
    Py_buffer predecessor, successor;
    if (!PyArg_ParseTuple(args, "iy*y*", &num_nodes, &predecessor, &successor)) return NULL;
    const int32_t *from = predecessor.buf, *to = successor.buf;
    const size_t n = (size_t)num_nodes, m = (size_t)predecessor.len / sizeof(int32_t);
    int32_t *first = calloc(n + 2, sizeof *first), *successors = malloc((m + 1) * sizeof *successors);
    int32_t *waiting_for = calloc(n, sizeof *waiting_for), *order = malloc(n * sizeof *order);
    PyObject *result = NULL;
    if (!first || !successors || !waiting_for || !order) {
        PyErr_NoMemory();
        goto done;
    }
    /* first[v + 1] counts, then points behind, the successors of v; filling moves it to the beginning of v + 1. */
    for (size_t e = 0; e < m; e++) {
        first[from[e] + 2]++;
        waiting_for[to[e]]++;
    }
    for (size_t v = 0; v < n; v++) first[v + 2] += first[v + 1];
    for (size_t e = 0; e < m; e++) successors[first[from[e] + 1]++] = to[e];
    size_t begin = 0, end = 0;
    for (size_t v = 0; v < n; v++)
        if (!waiting_for[v]) order[end++] = (int32_t)v;
    for (; begin < end; begin++)
        for (int32_t e = first[order[begin]]; e < first[order[begin] + 1]; e++)
            if (--waiting_for[successors[e]] == 0) order[end++] = successors[e];
    result = PyBytes_FromStringAndSize((char *)order, (Py_ssize_t)(end * sizeof *order));
done:
    free(first);
    free(successors);
    free(waiting_for);
    free(order);
    PyBuffer_Release(&predecessor);
    PyBuffer_Release(&successor);
    return result;
}

const char earliest_starts_doc[] =
    "earliest_starts(predecessor, successor, latency, duration, /)\n\n"
    "Earliest start (float64 bytes) of every node, for edges sorted by the topological place of their predecessor.";

PyObject *earliest_starts(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer predecessor, successor, latency, duration;
    if (!PyArg_ParseTuple(args, "y*y*y*y*", &predecessor, &successor, &latency, &duration)) return NULL;
    const int32_t *from = predecessor.buf, *to = successor.buf;
    const double *wait = latency.buf, *takes = duration.buf;
    const size_t m = (size_t)predecessor.len / sizeof(int32_t);
    PyObject *result = PyBytes_FromStringAndSize(NULL, duration.len);
    if (result) {
        double *start = (double *)PyBytes_AS_STRING(result);
        memset(start, 0, (size_t)duration.len);
        for (size_t e = 0; e < m; e++) {
            const double ready = start[from[e]] + takes[from[e]] + wait[e];
            if (ready > start[to[e]]) start[to[e]] = ready;
        }
    }
    PyBuffer_Release(&predecessor);
    PyBuffer_Release(&successor);
    PyBuffer_Release(&latency);
    PyBuffer_Release(&duration);
    return result;
}
