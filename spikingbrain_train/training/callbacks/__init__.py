"""What hangs on a run's hooks: one idea a file, each a :class:`~.callback.Callback`."""
