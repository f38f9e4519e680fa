def open_engine_session(engine, settings, pipe_schedule):
    raise NotImplementedError
