/* What the planner's compiled parts share. */
#ifndef PERSEUS_NATIVE_H
#define PERSEUS_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NONE (-1)

/* Tells a long run's caller where it stands, if it wants to know, and lets Python handle signals. False: stop, an exception
 * is set. `thread` is the thread state saved while the run goes without the global lock. */
static inline int report(PyObject *progress, int64_t where, PyThreadState **thread) {
    PyEval_RestoreThread(*thread);
    PyObject *answer = progress == Py_None ? PyLong_FromLong(0) : PyObject_CallFunction(progress, "L", (long long)where);
    const int go_on = answer && PyErr_CheckSignals() == 0;
    Py_XDECREF(answer);
    *thread = PyEval_SaveThread();
    return go_on;
}

PyObject *trace_frontier(PyObject *module, PyObject *args);
extern const char trace_frontier_doc[];

PyObject *solve_at_time(PyObject *module, PyObject *args);
extern const char solve_at_time_doc[];

PyObject *topological_order(PyObject *module, PyObject *args);
extern const char topological_order_doc[];

PyObject *earliest_starts(PyObject *module, PyObject *args);
extern const char earliest_starts_doc[];

PyObject *improve_plan(PyObject *module, PyObject *args);
extern const char improve_plan_doc[];

PyObject *run_with_switching(PyObject *module, PyObject *args);
extern const char run_with_switching_doc[];

#endif
