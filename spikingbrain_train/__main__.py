"""``python -m spikingbrain_train <command> ...``."""

from spikingbrain_train.commands.main import main

# dist_checkpointing starts its writers with "spawn", which leaves a module called __main__ alone.
if __name__ == "__main__":
    main()
