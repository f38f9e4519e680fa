"""What runs inside a training job. This page is the picture: one iteration of one rank, and who acts at each line.

The training thread; nothing here waits for another rank, a file, the driver or the network:

    # adapter, second iteration: opening.open_session
    session = Session(...)                     # session; prepares in a side thread: GPU, cache, saved state (opening)

    for each iteration:
        session.begin_iteration()              # session: looks at the newest order, obeys what holds from here on
            order = conversation.order         #   ranks/order: phase, plans, what is to be reported
            clocks.follow(plan)                #   clock/stage_clocks: the plan's clocks, one that is held, or none
            record = Record(event)             #   measure/recorder, measure/events: a mark on the compute stream
                                               #     (cuda_events); none while a CUDA graph is captured there
        for each instruction of this stage:
            session.begin_instruction()        # a mark; handed to the controller
            ...                                #   forward or backward, the framework's
            session.end_instruction()
        session.end_iteration()
            meter.take_in()                    #   measure/meter: times of the iterations that the GPU has finished
                sweep.add_iteration()          #     measure/sweep, energy: time and power of each clock (profiling)
            conversation.tell(time, energy)    #   ranks/records: a few bytes, put aside
            conversation.tell_state()

Beside it, on every rank (`side_threads` says what a side thread is):

    sampler                                    # measure/sampler: follows the energy counter
    anchors                                    # measure/anchors: where the GPU's time lies on the host's clock
    controller                                 # clock/controller: waits for the marks, goes by clock/lookahead, asks
                                               #   for clocks as early as changes take (clock/switch_latency; the
                                               #   GPU counts cycles meanwhile: clock/cycle_counting, seen_change)
        guarded clock, watchdog                # clock/give_back, watchdog, clock_owner: it comes back whatever happens
    conversation                               # ranks/conversation: about once a second
        store.append(records)                  #   ranks/store: the job's own rendezvous store
        order = store.read(newest order)

And on rank 0:

    rank zero                                  # rank_zero: about once a second
        table.take_in(records of all ranks)    #   ranks/job_table: arrays, a place for each rank
        decisions.conclude()                   #   ranks/decisions, plan_watch, speed_watch: what follows for the job
            time_ratio()                       #     ranks/comparison: under the plan beside interludes without it
        store.set(order)                       #   holds from an iteration that all ranks hear of before
        reporter.tell()                        #   reporter: the few lines of the log
    planner, when measurements were collected  # replan/background_planner
        merge(reports of all ranks)            #   replan/rank_report, measure/stage_measurements
        frontier, plan                         #   replan/job_planner, perseus_core.planning
        save                                   #   measure/profile_cache, replan/state_file

Phases of a job, `ranks/order.Phase`:

    opening -> warm up -> profile -> collect -> solve -> run -> interlude -> run -> interlude -> run ...
                                                                          -> collect -> solve -> run ...
                                                                          -> measure only
    and from any of them -> stepped aside, when something of ours failed: training goes on without us.

Rooms import each other one way: `ranks`, `measure` and `clock` know nothing of each other, but that the clock follows
the marks of `measure`; `replan` builds on all three; what lies in this folder on all of them. `tests/test_layers.py`
holds it.
"""
