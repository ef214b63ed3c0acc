"""``python -m spikingbrain_train.pipelines``."""

from spikingbrain_train.pipelines.command_line import pipelines

if __name__ == "__main__":
    pipelines()
