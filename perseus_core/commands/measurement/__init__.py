"""First contact with a GPU: `perseus doctor --measure` and `--measure --lock` measure what this package assumes.

    supervisor     starts the worker, kills it where a step exceeds its deadline, goes on with the next one in a new
                   worker, has the clocks given back at the end, whatever happened
    worker         a process that does one step after another, and tells each result as a line of JSON
    step_list      which steps there are, and in which order; `steps/` has a file for each or for two
    admission      whether clocks may be locked here at all
    bench, load    what a step gets: a GPU, a load for it, time
    results        what a step returns: figures, and a sentence that holds them against what is assumed
    page           one page of text, and the JSON file that a session reads (`perseus_core.runtime.gpu_measurements`)
    cuda_load, simulated_bench    the load of a real GPU, and of a simulated one

Clocks are locked only through the runtime's own guarded clock: it is claimed, and a watchdog
process gives it back when the worker is gone.
"""
