/* What the planner's compiled parts share. */
#ifndef PERSEUS_NATIVE_H
#define PERSEUS_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NONE (-1)

PyObject *trace_frontier(PyObject *module, PyObject *args);
extern const char trace_frontier_doc[];

PyObject *topological_order(PyObject *module, PyObject *args);
extern const char topological_order_doc[];

PyObject *earliest_starts(PyObject *module, PyObject *args);
extern const char earliest_starts_doc[];

PyObject *reclaim_slack(PyObject *module, PyObject *args);
extern const char reclaim_slack_doc[];

#endif
