/* perseus_core.planning._native: the planner's inner loops. Everything takes and returns flat arrays (the buffer protocol and
 * bytes), so the extension needs no header but Python's own. */
#include "native.h"

static PyMethodDef methods[] = {
    {"trace_frontier", trace_frontier, METH_VARARGS, trace_frontier_doc},
    {"solve_at_time", solve_at_time, METH_VARARGS, solve_at_time_doc},
    {"topological_order", topological_order, METH_VARARGS, topological_order_doc},
    {"earliest_starts", earliest_starts, METH_VARARGS, earliest_starts_doc},
    {"improve_plan", improve_plan, METH_VARARGS, improve_plan_doc},
    {"run_with_switching", run_with_switching, METH_VARARGS, run_with_switching_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "The planner's inner loops.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
