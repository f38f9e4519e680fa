/* A binary heap of nodes by when they are due, each with the way that leads into it. */
#ifndef PERSEUS_HEAP_H
#define PERSEUS_HEAP_H

#include "native.h"

typedef struct {
    int64_t due;
    int32_t node, via;
} HeapEntry;

typedef struct {
    HeapEntry *entries;
    int32_t *place; /* per node: where its entry is, or NONE */
    int32_t size;
} Heap;

static inline int heap_init(Heap *heap, int32_t num_nodes) {
    *heap = (Heap){malloc((size_t)num_nodes * sizeof(HeapEntry)), malloc((size_t)num_nodes * sizeof(int32_t)), 0};
    if (!heap->entries || !heap->place) return 0;
    for (int32_t v = 0; v < num_nodes; v++) heap->place[v] = NONE;
    return 1;
}

static inline void heap_free(Heap *heap) {
    free(heap->entries);
    free(heap->place);
}

static inline void heap_put(Heap *heap, int32_t at, HeapEntry entry) {
    heap->entries[at] = entry;
    heap->place[entry.node] = at;
}

static inline void heap_up(Heap *heap, int32_t at) {
    const HeapEntry entry = heap->entries[at];
    while (at > 0 && heap->entries[(at - 1) / 2].due > entry.due) {
        heap_put(heap, at, heap->entries[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    heap_put(heap, at, entry);
}

static inline void heap_down(Heap *heap, int32_t at) {
    const HeapEntry entry = heap->entries[at];
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= heap->size) break;
        if (child + 1 < heap->size && heap->entries[child + 1].due < heap->entries[child].due) child++;
        if (heap->entries[child].due >= entry.due) break;
        heap_put(heap, at, heap->entries[child]);
        at = child;
    }
    heap_put(heap, at, entry);
}

static inline void heap_remove(Heap *heap, int32_t node) {
    const int32_t at = heap->place[node];
    if (at == NONE) return;
    heap->place[node] = NONE;
    const HeapEntry moved = heap->entries[--heap->size];
    if (moved.node == node) return;
    heap_put(heap, at, moved);
    heap_up(heap, at);
    heap_down(heap, heap->place[moved.node]);
}

static inline void heap_clear(Heap *heap) {
    for (int32_t at = 0; at < heap->size; at++) heap->place[heap->entries[at].node] = NONE;
    heap->size = 0;
}

/* Puts a node in, or moves it forward when it is there with a later due. */
static inline void heap_offer(Heap *heap, int32_t node, int64_t due, int32_t via) {
    int32_t at = heap->place[node];
    if (at == NONE)
        at = heap->size++;
    else if (due >= heap->entries[at].due)
        return;
    heap->entries[at] = (HeapEntry){due, node, via};
    heap_up(heap, at);
}

#endif
